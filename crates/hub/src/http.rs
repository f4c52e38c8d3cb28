//! The one place that speaks HTTP.

use std::io::Read;
use std::time::Duration;

use ureq::config::RedirectAuthHeaders;

use crate::HubError;

const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// Silence after which a connection counts as broken.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// Gets addresses of one service.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<String>,
}

/// A successful answer.
pub(crate) struct Response {
    /// Where the body starts in the file: not zero where the server honoured a range.
    ///
    /// ModelScope answers ranges of small files with status 200, so only this header tells.
    pub(crate) first_byte: u64,
    /// Address of a listing's next page.
    pub(crate) next_page: Option<String>,
    body: ureq::Body,
}

impl Client {
    /// A client of the service at `endpoint`. `token` goes to addresses of that service and to no other, whether it
    /// redirects to them or names them in an answer. The usual variables name a proxy; it cannot reach this machine's own servers and is not asked to.
    pub(crate) fn new(endpoint: &str, token: Option<String>) -> Self {
        let is_local = ["http://127.0.0.1", "http://localhost"].iter().any(|host| endpoint.starts_with(host));
        let config = ureq::Agent::config_builder()
            .proxy(if is_local { None } else { ureq::Proxy::try_from_env() })
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT_LIMIT))
            .timeout_recv_response(Some(SILENCE_LIMIT))
            .timeout_per_read(Some(SILENCE_LIMIT))
            .user_agent(concat!("fewstep/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), endpoint: endpoint.to_owned(), token }
    }

    /// Whether an address is one of the service's own.
    pub(crate) fn is_own(&self, url: &str) -> bool {
        url.strip_prefix(&self.endpoint).is_some_and(|path| path.starts_with('/'))
    }

    /// Asks for an address, or for the bytes `[first, last]` of it.
    ///
    /// The range always has an end: ModelScope ignores one without.
    pub(crate) fn get(&self, url: &str, range: Option<[u64; 2]>) -> Result<Response, HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = self.token.as_ref().filter(|_| self.is_own(url)) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some([first, last]) = range {
            request = request.header("Range", format!("bytes={first}-{last}"));
        }
        let response = request.call().map_err(|reason| network(url, &reason))?;
        let header = |name: &str| response.headers().get(name)?.to_str().ok();
        let first_byte = header("content-range").and_then(first_byte).unwrap_or(0);
        let next_page = header("link").and_then(next_page);
        let url = url.to_owned();
        match response.status().as_u16() {
            200 | 206 => Ok(Response { first_byte, next_page, body: response.into_body() }),
            404 => Err(HubError::NotFound { url }),
            status @ (401 | 403) => Err(HubError::Denied { url, status }),
            status => Err(HubError::Status { url, status }),
        }
    }
}

impl Response {
    /// The body, piece by piece.
    pub(crate) fn into_reader(self) -> impl Read {
        self.body.into_reader()
    }

    /// The whole body, at most `limit` bytes of it.
    pub(crate) fn into_bytes(self, url: &str, limit: u64) -> Result<Vec<u8>, HubError> {
        let body = self.body.into_with_config().limit(limit);
        body.read_to_vec().map_err(|reason| network(url, &reason))
    }
}

fn network(url: &str, reason: &ureq::Error) -> HubError {
    HubError::Network { url: url.to_owned(), reason: reason.to_string() }
}

/// The first number of `bytes 10-99/100`.
fn first_byte(content_range: &str) -> Option<u64> {
    content_range.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

/// The address of `<address>; rel="next"`.
fn next_page(link: &str) -> Option<String> {
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    Some(next.trim().strip_prefix('<')?.split_once('>')?.0.to_owned())
}

/// Percent-encodes everything in a path that an address would read in another way.
pub(crate) fn encode_path(path: &str) -> String {
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(byte.into());
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read() {
        assert_eq!(first_byte("bytes 10-99/100"), Some(10));
        assert_eq!(first_byte("bytes */100"), None);
        let link = "<https://h/a?cursor=1>; rel=\"prev\", <https://h/a?cursor=2>; rel=\"next\"";
        assert_eq!(next_page(link).as_deref(), Some("https://h/a?cursor=2"));
        assert_eq!(next_page("<https://h/a>; rel=\"prev\""), None);
    }

    #[test]
    fn paths_keep_their_slashes_and_nothing_else_that_means_something() {
        assert_eq!(encode_path("vae/a b#1?é.json"), "vae/a%20b%231%3F%C3%A9.json");
    }
}
