//! `fewstep watch` from outside: who is let in, what is served, and what a real browser makes of it.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod browser;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fewstep_data::image::Picture;
use fewstep_report::run::{Happening, LOG_FILE, LogEntry, Sample, SampleSet};

use browser::Browser;

/// A prompt that would run and mark the page, were it taken for HTML.
const HOSTILE: &str = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">";
/// Colours of the pictures of teacher, first and last drawing: of nothing else on the page.
const TEACHER: [u8; 3] = [0, 200, 120];
const FIRST: [u8; 3] = [250, 0, 250];
const LAST: [u8; 3] = [250, 120, 0];

fn train_line(step: u64) -> LogEntry {
    let what = Happening::Train {
        epoch: 0,
        loss: Some(0.5 / step as f64),
        gradient_norm: Some(1.0 + (step % 7) as f64),
        learning_rate: 1e-4,
        samples_per_sec: Some(12.0),
        memory_bytes: Some(300 << 20),
    };
    LogEntry { what, step, time: 1e9 + step as f64 }
}

fn started(total_steps: u64) -> LogEntry {
    let what = Happening::Started {
        total_steps,
        steps_per_epoch: 10,
        rows: 80,
        trained_parameters: 1,
        parameters: 2,
        version: "a test".into(),
    };
    LogEntry { what, step: 0, time: 1e9 }
}

fn write_log(run: &Path, entries: impl IntoIterator<Item = LogEntry>) {
    let lines = entries.into_iter().map(|entry| serde_json::to_string(&entry).unwrap() + "\n");
    fs::write(run.join(LOG_FILE), lines.collect::<String>()).unwrap();
}

fn draw(run: &Path, name: &str, colour: [u8; 3]) {
    let prompts = [HOSTILE, "3d emoji of cat"];
    let samples = prompts.map(|prompt| Sample { prompt: prompt.into(), seed: 7 }).to_vec();
    let set = SampleSet { num_inference_steps: 4, cfg_scale: 1.0, height: 16, width: 16, samples };
    let picture = Picture { width: 16, height: 16, rgb: colour.repeat(256) };
    set.write(&run.join("samples").join(name), &[picture.clone(), picture]).unwrap();
}

/// A run under way, with all that the page shows.
fn write_run(run: &Path) {
    fs::create_dir_all(run).unwrap();
    let recipe = format!("task = \"direct_distill\"\nsample_prompts = [{}]\n", serde_json::json!(HOSTILE));
    fs::write(run.join("run.toml"), recipe).unwrap();
    let message = LogEntry { what: Happening::Message { text: HOSTILE.into() }, step: 30, time: 1e9 + 30.0 };
    write_log(run, std::iter::once(started(60)).chain((1..=30).map(train_line)).chain([message]));
    let monitor = "step,paired_error,saturation_ratio,contrast_ratio,sharpness_ratio,diversity_ratio,best\n\
                   10,0.4,1.2,0.9,0.7,1,1\n20,0.2,1.1,1,0.8,1,1\n30,0.3,1.3,1.1,0.9,0.9,0\n40,0.";
    fs::write(run.join("monitor.csv"), monitor).unwrap();
    draw(run, "teacher", TEACHER);
    draw(run, "step-00000000", FIRST);
    draw(run, "step-00000030", LAST);
}

/// A running `fewstep watch`.
struct Watch {
    process: Child,
    /// Where the page is, as printed.
    url: String,
}

impl Watch {
    fn start(run: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fewstep"));
        command.arg("watch").arg(run).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let mut url = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut url).unwrap();
        Self { process, url: url.trim().to_owned() }
    }

    /// `127.0.0.1:PORT` and `/TOKEN/`.
    fn address(&self) -> (&str, &str) {
        let rest = self.url.strip_prefix("http://").unwrap();
        rest.split_at(rest.find('/').unwrap())
    }

    /// The answer to a request line's method and path, asked for under the right name.
    fn ask(&self, method: &str, path: &str) -> Answer {
        let (address, _) = self.address();
        self.send(format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes())
    }

    /// The answer to GET of a path under the token.
    fn get(&self, path: &str) -> Answer {
        self.ask("GET", &format!("{}{path}", self.address().1))
    }

    fn send(&self, request: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.address().0).unwrap();
        stream.write_all(request).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head, body: bytes[end + 4..].to_vec() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A temporary folder with a run in it that is watched.
fn watched() -> (tempfile::TempDir, PathBuf, Watch) {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    write_run(&run);
    let watch = Watch::start(&run);
    (folder, run, watch)
}

#[test]
fn only_the_token_and_the_right_host_open_the_page() {
    let (_folder, _run, watch) = watched();
    let (address, path) = watch.address();
    assert_eq!(watch.get("").status, 200);
    assert_eq!(watch.ask("GET", path.trim_end_matches('/')).status, 308);
    let token = path.trim_matches('/');
    let wrong = format!("{}{}", if token.starts_with('0') { '1' } else { '0' }, &token[1..]);
    for other in
        ["/", "/view.json", &format!("/{wrong}/"), &path[..path.len() - 2], "//", &format!("/x{path}")]
    {
        let answer = watch.ask("GET", other);
        assert_eq!(answer.status, 403, "{other}");
        assert!(!answer.text().contains(token) && !answer.head.contains(token), "{other}");
    }
    let port = address.rsplit_once(':').unwrap().1;
    let hosted =
        |host: &str| watch.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).status;
    assert_eq!([hosted(address), hosted(&format!("localhost:{port}"))], [200, 200]);
    for host in ["evil.example", &format!("evil.example:{port}"), "127.0.0.1", "localhost", "127.0.0.1:1"] {
        assert_eq!(hosted(host), 403, "{host}");
    }
}

#[test]
fn nothing_but_the_run_can_be_read_and_nothing_written() {
    let (folder, run, watch) = watched();
    fs::write(folder.path().join("secret.png"), "secret").unwrap();
    let picture = watch.get("samples/step-00000030/000.png");
    assert_eq!(picture.body, fs::read(run.join("samples/step-00000030/000.png")).unwrap());
    assert!(picture.head.contains("image/png"), "{}", picture.head);
    for path in [
        "run.toml",
        "log.jsonl",
        "samples/",
        "samples/teacher/samples.json",
        "samples/../run.toml",
        "samples/teacher/../../run.toml",
        "samples/%2e%2e/run.toml",
        "../secret.png",
        "samples//etc/passwd",
        "samples/teacher/000.png/",
        "samples/step-00000099/000.png",
    ] {
        assert_eq!(watch.get(path).status, 404, "{path}");
    }
    #[cfg(unix)]
    {
        let picture = run.join("samples/teacher/001.png");
        fs::remove_file(&picture).unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret.png"), &picture).unwrap();
        assert_eq!(watch.get("samples/teacher/001.png").status, 404, "a link that leaves the run");
    }
    let page = watch.address().1;
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"] {
        assert_eq!(watch.ask(method, page).status, 405, "{method}");
    }
    let (whole, head) = (watch.get(""), watch.ask("HEAD", page));
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert!(head.head.contains(&format!("Content-Length: {}", whole.body.len())), "{}", head.head);
    for header in
        ["Content-Security-Policy: default-src 'none'", "frame-ancestors 'none'", "nosniff", "no-referrer"]
    {
        assert!(whole.head.contains(header), "{}", whole.head);
    }
}

#[test]
fn giant_slow_and_broken_requests_do_no_harm() {
    let (_folder, _run, watch) = watched();
    let (address, path) = watch.address();
    let long = "x".repeat(100_000);
    assert_eq!(watch.send(format!("GET /{long} HTTP/1.1\r\n\r\n").as_bytes()).status, 431);
    assert_eq!(
        watch.send(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nX: {long}\r\n\r\n").as_bytes()).status,
        431
    );
    assert_eq!(watch.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").status, 400);
    // Connections that say nothing: as many as are served at once, and then some.
    let silent: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(address).unwrap()).collect();
    let began = Instant::now();
    while TcpStream::connect(address).is_ok_and(|mut stream| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n");
        let mut answer = Vec::new();
        let asked = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_end(&mut answer));
        asked.is_err() || !answer.starts_with(b"HTTP/1.1 200")
    }) {
        assert!(began.elapsed() < Duration::from_secs(20), "silent connections block the page");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(silent);
}

#[test]
fn a_run_that_appears_and_grows_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("later");
    let watch = Watch::start(&run);
    let state = || watch.get("view.json").json()["state"].as_str().unwrap().to_owned();
    assert!(state().contains("Waiting"), "{}", state());
    write_run(&run);
    assert!(state().contains("step 30 of 60"), "{}", state());
    let mut log = fs::OpenOptions::new().append(true).open(run.join(LOG_FILE)).unwrap();
    let line = serde_json::to_string(&train_line(40)).unwrap();
    log.write_all(&line.as_bytes()[..50]).unwrap();
    assert!(state().contains("step 30 of 60"), "half a line is not read: {}", state());
    log.write_all(&line.as_bytes()[50..]).unwrap();
    log.write_all(b"\n").unwrap();
    assert!(state().contains("step 40 of 60"), "{}", state());
    draw(&run, "step-00000040", FIRST);
    let view = watch.get("view.json").json();
    assert_eq!(view["samples"]["steps"][2]["name"], "step 40");
    assert_eq!(view["samples"]["steps"][2]["pictures"][0]["prompt"], HOSTILE);
}

#[test]
fn many_thousand_lines_make_a_small_page() {
    let (_folder, run, watch) = watched();
    write_log(&run, std::iter::once(started(100_000)).chain((1..=50_000).map(train_line)));
    let began = Instant::now();
    let view = watch.get("view.json");
    assert!(view.text().contains("step 50000 of 100000"));
    assert!(view.body.len() < 1 << 20, "{} bytes", view.body.len());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// Runs `watch` with arguments that it refuses; returns what it said.
fn refused(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_fewstep")).arg("watch").args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn wrong_addresses_and_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().to_string_lossy().into_owned();
    let said = refused(&[&run, "--address", "0.0.0.0"]);
    assert!(said.contains("expected a loopback address") && said.contains("hint:"), "{said}");
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let said = refused(&[&file.to_string_lossy()]);
    assert!(said.contains("is a file"), "{said}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let said = refused(&[&run, "--port", &port]);
    assert!(said.contains("cannot listen on 127.0.0.1"), "{said}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_it() {
    let (_folder, _run, mut watch) = watched();
    let killed = Command::new("kill").args(["-INT", &watch.process.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(watch.process.wait().unwrap().code(), Some(130));
}

#[test]
fn a_browser_draws_curves_grids_and_sliders_and_keeps_prompts_text() {
    let Some(browser) = Browser::find() else { return };
    let (_folder, _run, watch) = watched();
    let seen = browser.open(&watch.url);
    check_page(&seen);
    assert!(seen.dom.contains(">live<"), "the page has asked for news and got them");
}

#[test]
fn a_browser_draws_the_report_of_an_ended_run_from_its_file_alone() {
    let Some(browser) = Browser::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path());
    let report = fewstep_report::run::write_report(folder.path(), 1e9 + 31.0).unwrap();
    let alone = tempfile::tempdir().unwrap();
    let copy = alone.path().join("report.html");
    fs::copy(report, &copy).unwrap();
    check_page(&browser.open(&format!("file://{}", copy.display())));
}

/// What a page of [`write_run`] shows.
fn check_page(seen: &browser::Seen) {
    assert_eq!(seen.complaints, Vec::<String>::new());
    assert!(!seen.dom.contains("<title>owned"), "a prompt has run");
    assert!(!seen.dom.contains("<script>document.title"), "a prompt is an element");
    assert!(
        seen.dom.contains("&lt;script&gt;document.title='owned'&lt;/script&gt;"),
        "the prompt is not there"
    );
    assert!(seen.dom.contains("step 30 of 60"));
    // Loss, gradient norm, learning rate, and two of the monitor.
    let curves = section(&seen.dom, "id=\"curves\"", "</section>");
    assert_eq!(curves.matches("<figure>").count(), 5, "{curves}");
    assert!(curves.matches("<path class=\"c0\" d=\"M").count() >= 5, "{curves}");
    let grid = section(&seen.dom, "id=\"grid\"", "id=\"pairs-title\"");
    assert_eq!((grid.matches("<img").count(), grid.matches("step 30: ").count()), (2, 2), "{grid}");
    let pairs = section(&seen.dom, "id=\"pairs\"", "</section>");
    assert_eq!(pairs.matches("type=\"range\"").count(), 2, "{pairs}");
    // The pictures themselves: the last drawing in the grid and right of each slider, the teacher left of it.
    let [teacher, first, last] = [TEACHER, FIRST, LAST].map(|colour| seen.pixels_of(colour));
    assert!(teacher > 5_000 && last > teacher, "{teacher} pixels of the teacher, {last} of the last drawing");
    assert_eq!(first, 0, "the first drawing is under the scrubber's other end");
}

fn section<'a>(dom: &'a str, from: &str, to: &str) -> &'a str {
    let after = dom.split_once(from).unwrap_or_else(|| panic!("no {from} in {dom}")).1;
    after.split_once(to).unwrap_or_else(|| panic!("no {to} after {from}")).0
}
