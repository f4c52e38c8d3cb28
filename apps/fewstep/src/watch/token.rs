//! The secret in the page's address.

use anyhow::{Context, Result};
use subtle::ConstantTimeEq;

/// Random bytes in a token.
const BYTES: usize = 24;

/// A secret that only the address printed at the start has.
pub(super) struct Token(String);

impl Token {
    /// A new one from the operating system.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub(super) fn random() -> Result<Self> {
        let mut bytes = [0; BYTES];
        getrandom::fill(&mut bytes).context("the system gives no random numbers")?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// As it stands in the address.
    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// Compares in a time that does not depend on how much of a guess is right.
    pub(super) fn is(&self, guess: &str) -> bool {
        self.0.as_bytes().ct_eq(guess.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_new_each_time_and_only_itself() {
        let (token, other) = (Token::random().unwrap(), Token::random().unwrap());
        assert_eq!(token.text().len(), 2 * BYTES);
        assert!(token.is(token.text()));
        for wrong in [other.text(), "", &token.text()[1..], &format!("{}0", token.text())] {
            assert!(!token.is(wrong), "{wrong}");
        }
    }
}
