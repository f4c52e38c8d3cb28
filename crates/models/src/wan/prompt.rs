//! What the peers make of a prompt before it is tokenised: ftfy's repairs, HTML's entities, single spaces.

use std::borrow::Cow;

/// The prompt without mojibake, curly quotes, fullwidth letters, entities and runs of white space; as diffusers'
/// `WanPipeline` and DiffSynth-Studio's tokenizer have it.
pub(super) fn cleaned(prompt: &str) -> String {
    let text = plsfix::fix_text(prompt, None);
    // Twice, as there: `&amp;lt;` becomes `<`.
    let text = unescaped(&unescaped(&text)).into_owned();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn unescaped(text: &str) -> Cow<'_, str> {
    htmlize::unescape(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_cleaned_as_the_peer_cleans_them() {
        // From diffusers' `prompt_clean` with ftfy 6.3.1.
        for (prompt, expected) in [
            ("  a  cat\n on\ta mat ", "a cat on a mat"),
            ("\u{201c}a cat\u{201d} isn\u{2019}t here", "\"a cat\" isn't here"),
            ("salt &amp;amp; pepper", "salt & pepper"),
            ("&lt;b&gt; caf&eacute;", "<b> café"),
            ("a b&nbsp;&nbsp;c", "a b c"),
            ("ＬＯＵＤ　ﬁsh", "LOUD fish"),
            ("cafe\u{301}", "café"),
            ("âœ” No problems", "✔ No problems"),
            ("一只猫 🎨 café, don't!", "一只猫 🎨 café, don't!"),
            ("", ""),
        ] {
            assert_eq!(cleaned(prompt), expected, "{prompt:?}");
        }
    }
}
