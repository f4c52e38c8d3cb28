//! A tiny server on loopback that answers like Hugging Face and like ModelScope.

#![allow(clippy::unwrap_used)] // A helper of the tests fails where the tests do.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// The only repository of a [`ModelServer`].
pub const SERVED_MODEL: &str = "owner/name";

/// Files per page of Hugging Face's listing.
const PAGE: usize = 2;

/// What the server does wrong, or in another way than usual, with the next file.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Closes the connection after so many bytes of the body.
    CutAfter(usize),
    /// Sends the whole file, whatever range was asked for.
    IgnoreRange,
    /// Sends the range with status 200, as ModelScope does for small files.
    RangeWithStatus200,
    /// Answers with a status and no body.
    Status(u16),
    /// Redirects to the same path of the host `localhost`, another name than the endpoint's.
    RedirectToLocalhost,
    /// Redirects to itself.
    RedirectToItself,
    /// Sends zeros behind the file until the client closes, under no `Content-Length`.
    WithoutEnd,
}

/// A request as it arrived.
#[derive(Clone, Debug, PartialEq)]
pub struct ServedRequest {
    /// Path and query.
    pub path: String,
    /// The header `Range`.
    pub range: Option<String>,
    /// The header `Authorization`.
    pub authorization: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Checksums that the listing states instead of the true ones.
    false_checksums: BTreeMap<String, String>,
    /// What the listing says instead of the files, with the address of its next page.
    listing: Option<(String, String)>,
    faults: Mutex<VecDeque<Fault>>,
    requests: Mutex<Vec<ServedRequest>>,
}

/// The server; it ends with the process.
#[derive(Debug)]
pub struct ModelServer {
    endpoint: String,
    state: Arc<State>,
}

impl ModelServer {
    /// Serves files, each with its path in [`SERVED_MODEL`].
    pub fn start(files: &[(&str, &[u8])]) -> Self {
        Self::with_checksums(files, &[])
    }

    /// A server whose listing states other checksums for some files.
    pub fn with_checksums(files: &[(&str, &[u8])], checksums: &[(&str, &str)]) -> Self {
        Self::of(State {
            files: files.iter().map(|(path, bytes)| ((*path).into(), bytes.to_vec())).collect(),
            false_checksums: checksums.iter().map(|(path, hash)| ((*path).into(), (*hash).into())).collect(),
            ..State::default()
        })
    }

    /// A server of Hugging Face's kind that lists this JSON on every page, with `next_page` as the address of the next
    /// one, where `ENDPOINT` stands for its own; empty for none.
    pub fn with_listing(json: &str, next_page: &str) -> Self {
        Self::of(State { listing: Some((json.to_owned(), next_page.to_owned())), ..State::default() })
    }

    fn of(state: State) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(state);
        let (shared, own) = (state.clone(), endpoint.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(&stream.unwrap(), &shared, &own);
            }
        });
        Self { endpoint, state }
    }

    /// The address, without a slash at the end.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// What goes wrong with the next files asked for, one after the other.
    pub fn fail(&self, faults: &[Fault]) {
        self.state.faults.lock().unwrap().extend(faults);
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<ServedRequest> {
        self.state.requests.lock().unwrap().clone()
    }

    /// The requests for files so far, listings left out.
    pub fn file_requests(&self) -> Vec<ServedRequest> {
        self.requests().into_iter().filter(|request| request.path.contains("/resolve/")).collect()
    }
}

fn answer(mut stream: &TcpStream, state: &State, endpoint: &str) {
    let request = read_request(stream);
    state.requests.lock().unwrap().push(request.clone());
    let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
    let reply = if path == format!("/api/models/{SERVED_MODEL}/tree/main") {
        hugging_face_listing(state, query, endpoint)
    } else if path == format!("/api/v1/models/{SERVED_MODEL}/repo/files") {
        json("", &modelscope_listing(state))
    } else {
        let prefixes =
            [format!("/{SERVED_MODEL}/resolve/main/"), format!("/models/{SERVED_MODEL}/resolve/master/")];
        let file = prefixes.iter().find_map(|prefix| state.files.get(path.strip_prefix(prefix)?));
        file.map_or_else(
            || head("404 Not Found", 0, ""),
            |bytes| file_reply(state, endpoint, bytes, &request),
        )
    };
    let endless = !reply.windows(14).any(|bytes| bytes == b"Content-Length");
    // The client may close first; that is its right.
    let mut sent = stream.write_all(&reply);
    while endless && sent.is_ok() {
        sent = stream.write_all(&[0; 1 << 16]);
    }
}

fn read_request(stream: &TcpStream) -> ServedRequest {
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    ServedRequest { path, range: headers.remove("range"), authorization: headers.remove("authorization") }
}

fn head(status: &str, length: usize, headers: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n").into()
}

fn json(headers: &str, body: &str) -> Vec<u8> {
    [head("200 OK", body.len(), headers), body.into()].concat()
}

fn checksum(state: &State, path: &str, bytes: &[u8]) -> String {
    let known = state.false_checksums.get(path).cloned();
    known.unwrap_or_else(|| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Two files a page; large files, which are those named `.safetensors`, have a checksum.
fn hugging_face_listing(state: &State, query: &str, endpoint: &str) -> Vec<u8> {
    if let Some((body, next)) = &state.listing {
        let link = if next.is_empty() { String::new() } else { format!("Link: <{next}>; rel=\"next\"\r\n") };
        return json(&link.replace("ENDPOINT", endpoint), body);
    }
    let start: usize = query.split("cursor=").nth(1).map_or(0, |cursor| cursor.parse().unwrap());
    let entry = |(path, bytes): (&String, &Vec<u8>)| {
        let size = bytes.len();
        if path.ends_with(".safetensors") {
            let oid = checksum(state, path, bytes);
            format!(
                r#"{{"type":"file","oid":"ab","size":{size},"path":"{path}","lfs":{{"oid":"{oid}","size":{size},"pointerSize":135}}}}"#
            )
        } else {
            format!(r#"{{"type":"file","oid":"ab","size":{size},"path":"{path}"}}"#)
        }
    };
    let mut entries = vec![r#"{"type":"directory","oid":"ab","size":0,"path":"vae"}"#.to_owned()];
    entries.extend(state.files.iter().skip(start).take(PAGE).map(entry));
    let next = start + PAGE;
    let link = match next < state.files.len() {
        true => format!(
            "Link: <{endpoint}/api/models/{SERVED_MODEL}/tree/main?recursive=true&cursor={next}>; rel=\"next\"\r\n"
        ),
        false => String::new(),
    };
    json(&link, &format!("[{}]", entries.join(",")))
}

fn modelscope_listing(state: &State) -> String {
    let entry = |(path, bytes): (&String, &Vec<u8>)| {
        let (hash, size) = (checksum(state, path, bytes).to_uppercase(), bytes.len());
        format!(r#"{{"Name":"x","Path":"{path}","Type":"blob","Size":{size},"Sha256":"{hash}"}}"#)
    };
    let mut entries = vec![r#"{"Name":"vae","Path":"vae","Type":"tree","Size":0,"Sha256":""}"#.to_owned()];
    entries.extend(state.files.iter().map(entry));
    format!(r#"{{"Code":200,"Data":{{"Files":[{}]}},"Message":"","Success":true}}"#, entries.join(","))
}

fn file_reply(state: &State, endpoint: &str, bytes: &[u8], request: &ServedRequest) -> Vec<u8> {
    let fault = state.faults.lock().unwrap().pop_front();
    if let Some(Fault::Status(status)) = fault {
        return head(&format!("{status} Refused"), 0, "");
    }
    let redirect = |to: &str| head("302 Found", 0, &format!("Location: {to}{}\r\n", request.path));
    match fault {
        Some(Fault::RedirectToLocalhost) => return redirect(&endpoint.replace("127.0.0.1", "localhost")),
        Some(Fault::RedirectToItself) => {
            state.faults.lock().unwrap().push_front(Fault::RedirectToItself);
            return redirect(endpoint);
        }
        Some(Fault::WithoutEnd) => return [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", bytes].concat(),
        _ => {}
    }
    let range = request.range.as_deref().filter(|_| !matches!(fault, Some(Fault::IgnoreRange)));
    let (status, headers, body) = match range {
        None => ("200 OK", String::new(), bytes),
        Some(range) => {
            let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
            let status = match fault {
                Some(Fault::RangeWithStatus200) => "200 OK",
                _ => "206 Partial Content",
            };
            let headers = format!("Content-Range: bytes {first}-{last}/{}\r\n", bytes.len());
            (status, headers, &bytes[first..=last])
        }
    };
    let sent = match fault {
        Some(Fault::CutAfter(count)) => &body[..count],
        _ => body,
    };
    [head(status, body.len(), &headers), sent.to_vec()].concat()
}
