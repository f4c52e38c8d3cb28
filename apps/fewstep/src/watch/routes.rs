//! What is answered to which request.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use fewstep_report::run::{
    LOG_FILE, MONITOR_FILE, Page, RECIPE_FILE, Run, SAMPLES_FOLDER, View, page, picture_path, security_policy,
};

use super::http::{Body, Request, Response, Status};
use super::token::Token;

/// The page of one run, and who may see it.
pub(super) struct Site {
    folder: PathBuf,
    /// Names under which this server is asked for.
    hosts: Vec<String>,
    token: Token,
    /// What was read last, and what the files looked like then.
    seen: Mutex<Option<(Looks, Run)>>,
}

/// Size and time of change of what a page is made from.
type Looks = Vec<Option<(u64, Option<SystemTime>)>>;

impl Site {
    /// The page of a run folder, served at an address.
    pub(super) fn new(folder: PathBuf, address: SocketAddr, token: Token) -> Self {
        let mut hosts = vec![address.to_string(), format!("localhost:{}", address.port())];
        if address.port() == 80 {
            // Browsers leave the usual port out.
            hosts.extend([address.to_string().trim_end_matches(":80").to_owned(), "localhost".into()]);
        }
        Self { folder, hosts, token, seen: Mutex::new(None) }
    }

    /// The answer to a request.
    pub(super) fn respond(&self, request: &Request) -> Response {
        if !self.hosts.iter().any(|host| host.eq_ignore_ascii_case(&request.host)) {
            return Response::plain(Status::Forbidden);
        }
        let mut parts = request.path.strip_prefix('/').unwrap_or_default().split('/');
        if !self.token.is(parts.next().unwrap_or_default()) {
            return Response::plain(Status::Forbidden);
        }
        match parts.collect::<Vec<_>>().as_slice() {
            [] => self.to_the_page(),
            [""] => self.page(),
            ["view.json"] => {
                content("application/json", "no-store", Body::Bytes(self.view().to_json().into_bytes()))
            }
            [SAMPLES_FOLDER, set, file] => self.picture(set, file),
            _ => Response::plain(Status::NotFound),
        }
    }

    /// The page's addresses are relative to its own, which ends in a slash.
    fn to_the_page(&self) -> Response {
        let headers = format!("Location: /{}/\r\n", self.token.text());
        Response { headers, ..Response::plain(Status::Moved) }
    }

    fn page(&self) -> Response {
        let policy =
            format!("Content-Security-Policy: {}; frame-ancestors 'none'\r\n", security_policy(Page::Live));
        let body = Body::Bytes(page(Page::Live, &self.view()).into_bytes());
        let mut response = content("text/html; charset=utf-8", "no-store", body);
        response.headers += &policy;
        response
    }

    fn picture(&self, set: &str, file: &str) -> Response {
        let opened = picture_path(set, file).map(|path| open_inside(&self.folder, &path));
        match opened {
            // Kept for a while, so that a scrubber does not flicker; a resumed run may draw a picture again.
            Some(Ok((file, length))) => content("image/png", "private, max-age=60", Body::File(file, length)),
            _ => Response::plain(Status::NotFound),
        }
    }

    /// The run as it is now; what has not changed is not read again.
    fn view(&self) -> View {
        // A panic while reading leaves what was seen before.
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let looks = self.looks();
        let run = match seen.take() {
            Some((before, run)) if before == looks => run,
            _ => Run::read(&self.folder),
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let view = View::live(&run, now.map_or(0.0, |now| now.as_secs_f64()));
        *seen = Some((looks, run));
        view
    }

    fn looks(&self) -> Looks {
        let look = |name: &str| {
            let metadata = fs::metadata(self.folder.join(name)).ok()?;
            Some((metadata.len(), metadata.modified().ok()))
        };
        [LOG_FILE, MONITOR_FILE, RECIPE_FILE, SAMPLES_FOLDER].map(look).to_vec()
    }
}

fn content(kind: &str, keep: &str, body: Body) -> Response {
    let headers = format!("Content-Type: {kind}\r\nCache-Control: {keep}\r\n");
    Response { status: Status::Ok, headers, body }
}

/// Opens a file that lies in a folder, also once links are followed, with its length.
fn open_inside(folder: &Path, path: &Path) -> io::Result<(File, u64)> {
    let whole = folder.join(path).canonicalize()?;
    if !whole.starts_with(folder.canonicalize()?) || !whole.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let file = File::open(whole)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}
