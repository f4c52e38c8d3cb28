//! What files a repository has.

use serde::Deserialize;
use serde_json::from_slice;

use crate::http::{Client, encode_path};
use crate::origin::is_inside;
use crate::{HubError, Settings, Source};

/// Large repositories list some thousand files in a few hundred bytes each.
const LIMIT_BYTES: u64 = 64 << 20;

/// Of a thousand files each; a page that leads to itself would be read without end.
const MAX_PAGES: usize = 1000;

/// A file of a repository.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RemoteFile {
    /// Path in the repository, with slashes.
    pub(crate) path: String,
    pub(crate) size_bytes: u64,
    /// Lower case hex. Hugging Face knows it only of large files.
    pub(crate) sha256: Option<String>,
}

/// All files of a repository's newest revision.
///
/// # Errors
/// If the service cannot be reached, does not have the repository, or answers with nonsense.
pub(crate) fn list(
    client: &Client,
    settings: &Settings,
    model_id: &str,
) -> Result<Vec<RemoteFile>, HubError> {
    let endpoint = &settings.endpoint;
    let mut files = match settings.source {
        Source::HuggingFace => {
            hugging_face(client, format!("{endpoint}/api/models/{model_id}/tree/main?recursive=true"))
        }
        Source::ModelScope => {
            let address =
                format!("{endpoint}/api/v1/models/{model_id}/repo/files?Revision=master&Recursive=true");
            modelscope(client, &address)
        }
    }?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// Where a file of a repository is downloaded.
pub(crate) fn file_url(settings: &Settings, model_id: &str, path: &str) -> String {
    let (endpoint, path) = (&settings.endpoint, encode_path(path));
    match settings.source {
        Source::HuggingFace => format!("{endpoint}/{model_id}/resolve/main/{path}"),
        Source::ModelScope => format!("{endpoint}/models/{model_id}/resolve/master/{path}"),
    }
}

/// Pages of a thousand files each.
fn hugging_face(client: &Client, first_page: String) -> Result<Vec<RemoteFile>, HubError> {
    #[derive(Deserialize)]
    struct Entry {
        r#type: String,
        path: String,
        #[serde(default)]
        size: u64,
        lfs: Option<Lfs>,
    }
    #[derive(Deserialize)]
    struct Lfs {
        oid: String,
        size: u64,
    }
    let mut files = Vec::new();
    let (mut page, mut pages) = (Some(first_page), 0);
    while let Some(url) = page {
        let response = client.get(&url, None)?;
        page = response.next_page.clone();
        if let Some(next) = page.as_ref().filter(|next| !client.is_own(next)) {
            let reason = format!("its next page is at {next}, expected an address of the same service");
            return Err(HubError::Listing { url, reason });
        }
        pages += 1;
        if pages > MAX_PAGES {
            return Err(HubError::Listing { url, reason: format!("it goes on after {MAX_PAGES} pages") });
        }
        let entries: Vec<Entry> = parse(&url, &response.into_bytes(&url, LIMIT_BYTES)?)?;
        for entry in entries.into_iter().filter(|entry| entry.r#type == "file") {
            let (size_bytes, sha256) = match entry.lfs {
                Some(lfs) => (lfs.size, Some(lfs.oid)),
                None => (entry.size, None),
            };
            files.push(checked(&url, RemoteFile { path: entry.path, size_bytes, sha256 })?);
        }
    }
    Ok(files)
}

fn modelscope(client: &Client, url: &str) -> Result<Vec<RemoteFile>, HubError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        data: Option<Data>,
        message: Option<String>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Data {
        files: Option<Vec<Entry>>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Entry {
        path: String,
        r#type: String,
        #[serde(default)]
        size: u64,
        sha256: Option<String>,
    }
    let answer: Answer = parse(url, &client.get(url, None)?.into_bytes(url, LIMIT_BYTES)?)?;
    let Some(entries) = answer.data.and_then(|data| data.files) else {
        let reason = format!("found no Data.Files; the server says {:?}", answer.message.unwrap_or_default());
        return Err(HubError::Listing { url: url.to_owned(), reason });
    };
    entries
        .into_iter()
        .filter(|entry| entry.r#type != "tree")
        .map(|entry| {
            let sha256 = entry.sha256.filter(|hash| !hash.is_empty());
            checked(url, RemoteFile { path: entry.path, size_bytes: entry.size, sha256 })
        })
        .collect()
}

fn parse<'a, T: Deserialize<'a>>(url: &str, bytes: &'a [u8]) -> Result<T, HubError> {
    from_slice(bytes).map_err(|error| HubError::Listing { url: url.to_owned(), reason: error.to_string() })
}

/// Servers are not trusted with paths outside the model folder.
fn checked(url: &str, mut file: RemoteFile) -> Result<RemoteFile, HubError> {
    file.sha256 = file.sha256.map(|hash| hash.to_ascii_lowercase());
    if is_inside(&file.path) {
        return Ok(file);
    }
    Err(HubError::UnsafePath { url: url.to_owned(), path: file.path })
}
