//! As much of HTTP/1.1 as a page needs: one request per connection, its head bounded in size and time, no bodies.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// Bytes of a request's head.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Header lines of a request.
const MAX_HEADERS: usize = 64;
/// Time for a request's head to arrive.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Time that a piece of the answer may wait for its reader.
const WRITE_TIME: Duration = Duration::from_secs(10);
/// What is still read of a request that has been refused, so that its sender sees the answer and no broken connection.
const DRAINED_BYTES: u64 = 1 << 20;
const DRAIN_TIME: Duration = Duration::from_millis(200);

/// The head of a GET or HEAD request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// The path without its query.
    pub(super) path: String,
    /// The `Host` header.
    pub(super) host: String,
    /// Whether only the answer's head is wanted.
    head_only: bool,
}

/// An answer.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: Status,
    /// Further header lines, each ended by CR LF.
    pub(super) headers: String,
    pub(super) body: Body,
}

/// What an answer carries.
#[derive(Debug)]
pub(super) enum Body {
    Bytes(Vec<u8>),
    /// A file and its length.
    File(File, u64),
}

/// The statuses that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Moved,
    Malformed,
    Forbidden,
    NotFound,
    Method,
    TooSlow,
    TooLarge,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::Moved => "308 Permanent Redirect",
            Self::Malformed => "400 Bad Request",
            Self::Forbidden => "403 Forbidden",
            Self::NotFound => "404 Not Found",
            Self::Method => "405 Method Not Allowed",
            Self::TooSlow => "408 Request Timeout",
            Self::TooLarge => "431 Request Header Fields Too Large",
        }
    }
}

impl Response {
    /// A status that says all there is to say.
    pub(super) fn plain(status: Status) -> Self {
        let body = Body::Bytes(format!("{}\n", status.line()).into_bytes());
        Self { status, headers: "Content-Type: text/plain; charset=utf-8\r\n".into(), body }
    }

    fn write(self, stream: &mut impl Write, head_only: bool) -> io::Result<()> {
        let length = match &self.body {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::File(_, length) => *length,
        };
        let (line, headers) = (self.status.line(), self.headers);
        write!(
            stream,
            "HTTP/1.1 {line}\r\nContent-Length: {length}\r\nConnection: close\r\nX-Content-Type-Options: nosniff\r\n\
             Referrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n\
             Cross-Origin-Opener-Policy: same-origin\r\nX-Frame-Options: DENY\r\n{headers}\r\n"
        )?;
        match self.body {
            _ if head_only => {}
            Body::Bytes(bytes) => stream.write_all(&bytes)?,
            Body::File(file, length) => io::copy(&mut file.take(length), stream).map(drop)?,
        }
        stream.flush()
    }
}

/// Reads a request and writes the answer to it.
///
/// # Errors
/// If the connection breaks.
pub(super) fn exchange(mut stream: TcpStream, respond: impl FnOnce(&Request) -> Response) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(WRITE_TIME))?;
    match read_request(&mut stream)? {
        Ok(request) => respond(&request).write(&mut stream, request.head_only),
        Err(status) => {
            Response::plain(status).write(&mut stream, false)?;
            stream.shutdown(Shutdown::Write)?;
            stream.set_read_timeout(Some(DRAIN_TIME))?;
            // What comes is thrown away, and so is the reason why no more comes.
            let _ = io::copy(&mut stream.take(DRAINED_BYTES), &mut io::sink());
            Ok(())
        }
    }
}

/// The request's head, or the status that refuses it.
fn read_request(stream: &mut TcpStream) -> io::Result<Result<Request, Status>> {
    let deadline = Instant::now() + HEAD_TIME;
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Err(Status::TooSlow));
        }
        stream.set_read_timeout(Some(left))?;
        let count = match stream.read(&mut piece) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                continue;
            }
            Err(error) => return Err(error),
        };
        head.extend_from_slice(&piece[..count]);
        if let Some(request) = parse(&head) {
            return Ok(request);
        }
    }
}

/// `None` while the head is incomplete and may become one.
fn parse(head: &[u8]) -> Option<Result<Request, Status>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let complete = match parsed.parse(head) {
        Ok(status) => status.is_complete(),
        Err(httparse::Error::TooManyHeaders) => return Some(Err(Status::TooLarge)),
        Err(_) => return Some(Err(Status::Malformed)),
    };
    if head.len() > MAX_HEAD_BYTES {
        return Some(Err(Status::TooLarge));
    }
    complete.then(|| request(&parsed))
}

fn request(parsed: &httparse::Request<'_, '_>) -> Result<Request, Status> {
    let head_only = match parsed.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err(Status::Method),
    };
    let mut hosts = parsed.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return Err(Status::Malformed) };
    let host = String::from_utf8(host.value.to_vec()).map_err(|_| Status::Malformed)?;
    let path = parsed.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path).to_owned();
    Ok(Request { path, host, head_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(head: &str) -> Option<Result<Request, Status>> {
        parse(head.as_bytes())
    }

    #[test]
    fn a_head_is_read_whole_and_its_query_left_out() {
        let head = "GET /a/b?c=/d HTTP/1.1\r\nhost: h:1\r\nX: y\r\n\r\n";
        let expected = Request { path: "/a/b".into(), host: "h:1".into(), head_only: false };
        assert_eq!(get(head), Some(Ok(expected)));
        for cut in 0..head.len() {
            assert_eq!(get(&head[..cut]), None, "{cut} bytes");
        }
    }

    #[test]
    fn what_is_no_plain_reading_request_is_refused() {
        let refused = |head: &str| get(head).and_then(Result::err);
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "get"] {
            assert_eq!(refused(&format!("{method} / HTTP/1.1\r\nHost: h\r\n\r\n")), Some(Status::Method));
        }
        assert_eq!(refused("GET / HTTP/1.1\r\n\r\n"), Some(Status::Malformed));
        assert_eq!(refused("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), Some(Status::Malformed));
        assert_eq!(refused("\u{16}\u{3}\u{1}"), Some(Status::Malformed), "a TLS greeting");
        let many = "X: y\r\n".repeat(MAX_HEADERS + 1);
        assert_eq!(refused(&format!("GET / HTTP/1.1\r\n{many}")), Some(Status::TooLarge));
        let long = "a".repeat(MAX_HEAD_BYTES);
        assert_eq!(refused(&format!("GET /{long}")), Some(Status::TooLarge));
    }

    #[test]
    fn the_answer_to_head_has_the_length_and_not_the_body() {
        let answer = |head_only| {
            let mut bytes = Vec::new();
            Response::plain(Status::Forbidden).write(&mut bytes, head_only).unwrap();
            String::from_utf8(bytes).unwrap()
        };
        let (whole, head) = (answer(false), answer(true));
        assert!(whole.starts_with("HTTP/1.1 403 Forbidden\r\nContent-Length: 14\r\n"), "{whole}");
        assert_eq!(whole.strip_prefix(&head), Some("403 Forbidden\n"));
        assert!(head.ends_with("\r\n\r\n"));
    }
}
