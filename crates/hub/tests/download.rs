//! Downloads against a server on loopback.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fewstep_hub::{Event, Hub, HubError, Need, Origin, Settings, Source};
use fewstep_testkit::{Fault, ModelServer, SERVED_MODEL};

const BOTH: [Source; 2] = [Source::HuggingFace, Source::ModelScope];

/// 1000 bytes that differ from place to place, so that a wrong offset shows.
fn weights() -> Vec<u8> {
    (0..1000_u32).map(|index| (index * index / 7) as u8).collect()
}

fn files(weights: &[u8]) -> [(&'static str, &[u8]); 5] {
    [
        ("README.md", b"about"),
        ("tokenizer/merges.txt", b"m e"),
        ("transformer/config.json", b"{}"),
        ("transformer/model-1.safetensors", weights),
        ("transformer/old/model-1.safetensors", b"old"),
    ]
}

/// Downloads from the server into `folder` without waiting between attempts.
fn settings(server: &ModelServer, source: Source, folder: &Path) -> Settings {
    Settings {
        source,
        endpoint: server.endpoint().to_owned(),
        token: None,
        base_folder: folder.to_owned(),
        offline: None,
        retry_wait: Duration::ZERO,
    }
}

/// Downloads the files of one origin; returns their paths relative to the repository's folder.
fn fetch(settings: Settings, origin: &str) -> Result<Vec<PathBuf>, HubError> {
    let hub = Hub::new(settings);
    let plan = hub.plan(&[Origin::parse(origin)?])?;
    hub.download(&plan, &mut |_| ())?;
    assert_eq!(plan.missing_bytes(), 0);
    let folder = hub.folder(SERVED_MODEL);
    Ok(plan.paths(0).map(|path| path.strip_prefix(&folder).unwrap().to_owned()).collect())
}

const WEIGHTS: &str = "owner/name:transformer/*.safetensors";
const TARGET: &str = "owner/name/transformer/model-1.safetensors";
const PART: &str = "owner/name/transformer/model-1.safetensors.part";

/// A partial file with the first so many bytes of the weights.
fn begin(folder: &Path, bytes: &[u8]) {
    fs::create_dir_all(folder.join("owner/name/transformer")).unwrap();
    fs::write(folder.join(PART), bytes).unwrap();
}

#[test]
fn both_services_deliver_the_files_of_a_pattern_and_no_others() {
    for source in BOTH {
        let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
        let server = ModelServer::start(&files(&weights));
        let settings = settings(&server, source, folder.path());
        let found = fetch(settings.clone(), WEIGHTS).unwrap();
        assert_eq!(found, [Path::new("transformer/model-1.safetensors")]);
        assert_eq!(fs::read(folder.path().join(TARGET)).unwrap(), weights);
        let found = fetch(settings.clone(), "owner/name:tokenizer/").unwrap();
        assert_eq!(found, [Path::new("tokenizer/merges.txt")]);
        assert_eq!(fetch(settings, "owner/name").unwrap().len(), 5);
        let names: Vec<String> = server.file_requests().into_iter().map(|request| request.path).collect();
        assert_eq!(names.len(), 5, "each file once: {names:?}");
        assert!(!folder.path().join(PART).exists());
    }
}

#[test]
fn files_of_the_listed_size_are_not_fetched_again_and_others_are() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    let settings = settings(&server, Source::HuggingFace, folder.path());
    fetch(settings.clone(), WEIGHTS).unwrap();
    fs::write(folder.path().join(TARGET), b"cut off").unwrap();
    fetch(settings.clone(), WEIGHTS).unwrap();
    fetch(settings, WEIGHTS).unwrap();
    assert_eq!(server.file_requests().len(), 2);
    assert_eq!(fs::read(folder.path().join(TARGET)).unwrap(), weights);
}

#[test]
fn a_partial_file_is_continued_where_it_ended() {
    for (source, fault) in [
        (Source::HuggingFace, Fault::CutAfter(700)),
        (Source::ModelScope, Fault::CutAfter(700)),
        (Source::ModelScope, Fault::RangeWithStatus200),
    ] {
        let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
        let server = ModelServer::start(&files(&weights));
        begin(folder.path(), &weights[..300]);
        server.fail(&[fault]);
        let hub = Hub::new(settings(&server, source, folder.path()));
        let plan = hub.plan(&[Origin::parse(WEIGHTS).unwrap()]).unwrap();
        assert_eq!(plan.missing_bytes(), 700);
        let mut received = 0;
        let mut count = |event: Event| {
            if let Event::Received(bytes) = event {
                received += bytes;
            }
        };
        hub.download(&plan, &mut count).unwrap();
        assert_eq!(received, 700);
        let ranges: Vec<_> = server.file_requests().into_iter().map(|request| request.range).collect();
        assert_eq!(ranges, [Some("bytes=300-999".to_owned())]);
        assert_eq!(fs::read(folder.path().join(TARGET)).unwrap(), weights);
    }
}

#[test]
fn a_broken_connection_is_continued_at_the_byte_it_broke() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    server.fail(&[Fault::CutAfter(123), Fault::Status(503), Fault::CutAfter(77)]);
    let hub = Hub::new(settings(&server, Source::HuggingFace, folder.path()));
    let plan = hub.plan(&[Origin::parse(WEIGHTS).unwrap()]).unwrap();
    let mut retries = Vec::new();
    let mut note = |event: Event| {
        if let Event::Retrying(error) = event {
            retries.push(error.to_string());
        }
    };
    hub.download(&plan, &mut note).unwrap();
    assert_eq!(fs::read(folder.path().join(TARGET)).unwrap(), weights);
    let ranges: Vec<_> = server.file_requests().into_iter().map(|request| request.range).collect();
    let from = |first: usize| Some(format!("bytes={first}-999"));
    assert_eq!(ranges, [None, from(123), from(123), from(200)]);
    assert!(retries[0].contains("after 123 of 1000 bytes"), "{retries:?}");
    assert!(retries[1].contains("status 503"), "{retries:?}");
}

#[test]
fn a_download_that_never_moves_is_given_up_and_keeps_what_it_has() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    server.fail(&[[Fault::CutAfter(50)].as_slice(), &[Fault::Status(500); 9]].concat());
    let error = fetch(settings(&server, Source::ModelScope, folder.path()), WEIGHTS).unwrap_err();
    assert!(matches!(error, HubError::Status { status: 500, .. }), "{error}");
    assert_eq!(server.file_requests().len(), 5);
    assert_eq!(fs::read(folder.path().join(PART)).unwrap(), weights[..50]);
    assert!(!folder.path().join(TARGET).exists());
}

#[test]
fn a_server_without_ranges_sends_the_file_from_its_start() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    begin(folder.path(), b"other bytes");
    server.fail(&[Fault::IgnoreRange]);
    fetch(settings(&server, Source::HuggingFace, folder.path()), WEIGHTS).unwrap();
    assert_eq!(fs::read(folder.path().join(TARGET)).unwrap(), weights);
}

#[test]
fn a_partial_file_longer_than_the_file_starts_over() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    begin(folder.path(), &[7; 2000]);
    fetch(settings(&server, Source::HuggingFace, folder.path()), WEIGHTS).unwrap();
    assert_eq!(fs::read(folder.path().join(TARGET)).unwrap(), weights);
    assert_eq!(server.file_requests()[0].range, None);
}

#[test]
fn a_wrong_checksum_is_an_error_and_removes_the_bytes() {
    for source in BOTH {
        let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
        let listed = "0".repeat(64);
        let checksums = [("transformer/model-1.safetensors", listed.as_str())];
        let server = ModelServer::with_checksums(&files(&weights), &checksums);
        let error = fetch(settings(&server, source, folder.path()), WEIGHTS).unwrap_err();
        assert!(matches!(&error, HubError::Checksum { expected, .. } if *expected == listed), "{error}");
        assert!(error.to_string().contains("model-1.safetensors"), "{error}");
        assert!(!folder.path().join(TARGET).exists() && !folder.path().join(PART).exists());
    }
}

#[test]
fn a_damaged_partial_file_is_found_by_the_checksum() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    begin(folder.path(), &[9; 300]);
    let settings = settings(&server, Source::HuggingFace, folder.path());
    let error = fetch(settings.clone(), WEIGHTS).unwrap_err();
    assert!(matches!(error, HubError::Checksum { .. }), "{error}");
    fetch(settings, WEIGHTS).unwrap();
    assert_eq!(fs::read(folder.path().join(TARGET)).unwrap(), weights);
}

#[test]
fn offline_serves_what_is_there_and_names_variable_and_folder_for_the_rest() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    let online = settings(&server, Source::HuggingFace, folder.path());
    fetch(online.clone(), WEIGHTS).unwrap();
    let offline =
        Settings { offline: Some("HF_HUB_OFFLINE"), endpoint: "http://127.0.0.1:1".into(), ..online };
    let found = fetch(offline.clone(), WEIGHTS).unwrap();
    assert_eq!(found, [Path::new("transformer/model-1.safetensors")]);
    let error = fetch(offline, "owner/name:vae/*.safetensors").unwrap_err().to_string();
    let looked = folder.path().join("owner/name").display().to_string();
    for part in ["HF_HUB_OFFLINE", "vae/*.safetensors", &looked] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_partial_file_is_no_file_offline() {
    let folder = tempfile::tempdir().unwrap();
    begin(folder.path(), b"half");
    let server = ModelServer::start(&[]);
    let online = settings(&server, Source::HuggingFace, folder.path());
    let error = fetch(Settings { offline: Some("X"), ..online }, "owner/name:transformer/").unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
}

#[test]
fn what_a_server_does_not_have_is_named() {
    for source in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let server = ModelServer::start(&files(b"x"));
        let settings = settings(&server, source, folder.path());
        let error = fetch(settings.clone(), "owner/other:x").unwrap_err();
        assert!(matches!(&error, HubError::NotFound { url } if url.contains("owner/other")), "{error}");
        server.fail(&[Fault::Status(404)]);
        let error = fetch(settings.clone(), WEIGHTS).unwrap_err();
        assert!(
            matches!(&error, HubError::NotFound { url } if url.ends_with("model-1.safetensors")),
            "{error}"
        );
        let error = fetch(settings, "owner/name:*.bin").unwrap_err().to_string();
        assert!(error.contains("owner/name:*.bin") && error.contains("transformer/config.json"), "{error}");
    }
}

#[test]
fn optional_files_may_be_absent() {
    let folder = tempfile::tempdir().unwrap();
    let server = ModelServer::start(&files(b"x"));
    let hub = Hub::new(settings(&server, Source::ModelScope, folder.path()));
    let optional = |pattern| Origin::new(SERVED_MODEL, pattern, Need::IfThere).unwrap();
    let plan = hub.plan(&[optional("scheduler/"), optional("tokenizer/")]).unwrap();
    hub.download(&plan, &mut |_| ()).unwrap();
    assert_eq!(plan.paths(0).count(), 0);
    assert!(plan.paths(1).all(Path::is_file) && plan.paths(1).count() == 1);
}

#[test]
fn paths_that_leave_the_model_folder_are_refused() {
    for source in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let server = ModelServer::start(&[("../../evil.json", b"x")]);
        let error = fetch(settings(&server, source, folder.path()), "owner/name").unwrap_err();
        assert!(matches!(error, HubError::UnsafePath { .. }), "{error}");
    }
}

#[test]
fn the_token_is_sent_and_a_refusal_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let server = ModelServer::start(&files(b"x"));
    let settings = settings(&server, Source::HuggingFace, folder.path());
    server.fail(&[Fault::Status(401)]);
    let error = fetch(Settings { token: Some("secret".into()), ..settings }, WEIGHTS).unwrap_err();
    assert!(matches!(error, HubError::Denied { status: 401, .. }), "{error}");
    assert_eq!(server.file_requests()[0].authorization.as_deref(), Some("Bearer secret"));
}

#[test]
fn a_redirect_to_another_host_keeps_the_range_and_not_the_token() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    begin(folder.path(), &weights[..300]);
    server.fail(&[Fault::RedirectToLocalhost]);
    let settings = settings(&server, Source::HuggingFace, folder.path());
    fetch(Settings { token: Some("secret".into()), ..settings }, WEIGHTS).unwrap();
    assert_eq!(fs::read(folder.path().join(TARGET)).unwrap(), weights);
    let requests = server.file_requests();
    let seen: Vec<_> = requests.iter().map(|request| request.authorization.as_deref()).collect();
    assert_eq!(seen, [Some("Bearer secret"), None]);
    assert_eq!(requests[1].range.as_deref(), Some("bytes=300-999"));
}

#[test]
fn a_server_that_is_not_there_is_an_error_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&ModelServer::start(&[]), Source::ModelScope, folder.path());
    let error = fetch(Settings { endpoint: "http://127.0.0.1:1".into(), ..settings }, WEIGHTS).unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    assert!(error.to_string().contains("FEWSTEP_SKIP_DOWNLOAD"), "{error}");
}

#[test]
fn two_downloads_of_one_file_do_not_mix() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    begin(folder.path(), b"");
    let other = fs::File::options().append(true).open(folder.path().join(PART)).unwrap();
    other.lock().unwrap();
    let error = fetch(settings(&server, Source::HuggingFace, folder.path()), WEIGHTS).unwrap_err();
    assert!(matches!(error, HubError::Busy { .. }), "{error}");
}

/// `/dev/full` refuses every byte as a full disk does.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_with_the_bytes_that_are_missing() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    fs::create_dir_all(folder.path().join("owner/name/transformer")).unwrap();
    std::os::unix::fs::symlink("/dev/full", folder.path().join(PART)).unwrap();
    let error = fetch(settings(&server, Source::HuggingFace, folder.path()), WEIGHTS).unwrap_err();
    assert!(matches!(error, HubError::DiskFull { missing_bytes: 1000, .. }), "{error}");
}

fn list(server: &ModelServer, token: Option<&str>) -> Result<(), HubError> {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(server, Source::HuggingFace, folder.path());
    let hub = Hub::new(Settings { token: token.map(str::to_owned), ..settings });
    hub.plan(&[Origin::parse("owner/name").unwrap()]).map(|_| ())
}

#[test]
fn a_listing_that_goes_on_elsewhere_is_refused_and_gets_no_token_there() {
    let other = ModelServer::start(&files(b"x"));
    for address in [other.endpoint(), "http://localhost:1", "ENDPOINT.evil.example", "ENDPOINT@evil.example"]
    {
        let next = format!("{address}/api/models/owner/name/tree/main?cursor=2");
        let server = ModelServer::with_listing("[]", &next);
        let error = list(&server, Some("secret")).unwrap_err();
        assert!(matches!(&error, HubError::Listing { .. }), "{error}");
        assert!(error.to_string().contains("expected an address of the same service"), "{error}");
        assert_eq!(server.requests()[0].authorization.as_deref(), Some("Bearer secret"));
    }
    assert_eq!(other.requests(), []);
}

#[test]
fn a_listing_that_leads_to_itself_ends() {
    let server = ModelServer::with_listing("[]", "ENDPOINT/api/models/owner/name/tree/main?cursor=1");
    let error = list(&server, None).unwrap_err().to_string();
    assert!(error.contains("it goes on after 1000 pages"), "{error}");
}

#[test]
fn listings_of_nonsense_are_errors() {
    let entry = |path: &str, size: &str| format!(r#"[{{"type": "file", "path": "{path}", "size": {size}}}]"#);
    for (json, expected) in [
        ("[".repeat(100_000), "no valid list of files"),
        (entry("x", "-1"), "no valid list of files"),
        (entry("x", "99999999999999999999"), "no valid list of files"),
        (entry("/etc/passwd", "1"), "expected a path inside the repository"),
        (entry("a/../../x", "1"), "expected a path inside the repository"),
        (entry(r"..\\x", "1"), "expected a path inside the repository"),
    ] {
        let error = list(&ModelServer::with_listing(&json, ""), None).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn sizes_that_add_up_to_more_than_there_is_are_counted_without_overflow() {
    let entries = [1, 2].map(|at| format!(r#"{{"type": "file", "path": "{at}", "size": {}}}"#, u64::MAX));
    let server = ModelServer::with_listing(&format!("[{}]", entries.join(",")), "");
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::new(settings(&server, Source::HuggingFace, folder.path()));
    assert_eq!(hub.plan(&[Origin::parse("owner/name").unwrap()]).unwrap().missing_bytes(), u64::MAX);
}

#[test]
fn a_redirect_that_leads_to_itself_ends() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    server.fail(&[Fault::RedirectToItself]);
    let error = fetch(settings(&server, Source::HuggingFace, folder.path()), WEIGHTS).unwrap_err();
    assert!(matches!(&error, HubError::Network { .. }), "{error}");
    assert!(server.file_requests().len() < 100, "{}", server.file_requests().len());
}

#[test]
fn a_body_without_end_is_cut_at_the_listed_size() {
    let (weights, folder) = (weights(), tempfile::tempdir().unwrap());
    let server = ModelServer::start(&files(&weights));
    server.fail(&[Fault::WithoutEnd; 5]);
    let error = fetch(settings(&server, Source::HuggingFace, folder.path()), WEIGHTS).unwrap_err();
    assert!(matches!(&error, HubError::Range { expected: 1000, .. }), "{error}");
    assert_eq!(fs::read(folder.path().join(PART)).unwrap().len(), 0);
    assert!(!folder.path().join(TARGET).exists());
}
