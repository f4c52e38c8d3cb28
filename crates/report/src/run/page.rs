//! The page of a run: one HTML file with style and script inside, that nothing else can be loaded into.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::View;
use crate::charts::escape;
use crate::html::STYLE;

const TEMPLATE: &str = include_str!("page.html");
const RUN_STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Where a page is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// From a server that has the pictures and news.
    Live,
    /// From a file, alone.
    Report,
}

/// The whole page.
pub fn page(kind: Page, view: &View) -> String {
    let style = [STYLE, RUN_STYLE].concat();
    fill(TEMPLATE, |name| match name {
        "policy" => escape(&security_policy(kind)),
        "name" => escape(&view.name),
        "style" => style.clone(),
        "view" => view.to_json(),
        "script" => SCRIPT.to_owned(),
        other => panic!("no value for {other} of the page's template"),
    })
}

/// The page's Content-Security-Policy: its own style, script and pictures, and nothing else.
pub fn security_policy(kind: Page) -> String {
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)));
    let (style, script) = (hash(&[STYLE, RUN_STYLE].concat()), hash(SCRIPT));
    let sources = match kind {
        Page::Live => "img-src 'self'; connect-src 'self'",
        Page::Report => "img-src data:",
    };
    format!(
        "default-src 'none'; style-src {style}; script-src {script}; {sources}; base-uri 'none'; form-action 'none'"
    )
}

/// Replaces each `{{name}}` of a template; what is put in is not looked at again.
fn fill(template: &str, value: impl Fn(&str) -> String) -> String {
    let mut parts = template.split("{{");
    let mut filled = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once("}}").unwrap_or((part, ""));
        filled += &value(name);
        filled += rest;
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Run;

    #[test]
    fn nothing_put_into_the_page_can_leave_its_place() {
        let name = "</script><script>alert(1)</script>{{script}}";
        let run = Run { name: name.into(), recipe: format!("model = \"{name}\""), ..Run::default() };
        let page = page(Page::Live, &View::live(&run, 0.0));
        assert_eq!(page.matches("<script").count(), 2, "the data and the page's own");
        assert_eq!(page.matches("</script").count(), 2);
        assert_eq!(page.matches(SCRIPT).count(), 1);
    }

    #[test]
    fn the_policy_names_the_hashes_of_what_the_page_holds() {
        let page = page(Page::Report, &View::live(&Run::default(), 0.0));
        let between = |open: &str, close: &str| {
            let after = page.rsplit_once(open).unwrap().1;
            after.split_once(close).unwrap().0.to_owned()
        };
        let policy = security_policy(Page::Report);
        for content in [between("<style>", "</style>"), between("<script>", "</script>")] {
            let hash = STANDARD.encode(Sha256::digest(content));
            assert!(policy.contains(&format!("'sha256-{hash}'")), "{policy}");
        }
        for foreign in ["http://", "https://", "url(", "@import", "<link", " style=", " onclick"] {
            assert!(!page.contains(foreign), "the page contains {foreign}");
        }
    }
}
