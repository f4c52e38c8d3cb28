//! From wanted patterns to files in the model folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::http::Client;
use crate::listing::{RemoteFile, file_url, list};
use crate::transfer::{Transfer, part_path};
use crate::{Event, HubError, Need, Origin, Settings};

/// A service and the local folder its files go to.
#[derive(Clone, Debug)]
pub struct Hub {
    settings: Settings,
    client: Client,
}

/// Which files answer a list of [`Origin`]s.
#[derive(Clone, Debug)]
pub struct Plan {
    /// One group per origin, in their order.
    groups: Vec<Vec<PlannedFile>>,
}

/// A file of the model folder, and where it comes from unless downloading is off.
#[derive(Clone, Debug)]
struct PlannedFile {
    path: PathBuf,
    remote: Option<(String, RemoteFile)>,
}

impl Hub {
    /// Nothing is contacted yet.
    pub fn new(settings: Settings) -> Self {
        let client = Client::new(&settings.endpoint, settings.token.clone());
        Self { settings, client }
    }

    /// The folder of a repository's files.
    pub fn folder(&self, model_id: &str) -> PathBuf {
        self.settings.base_folder.join(model_id)
    }

    /// Finds the files of each origin: in the service's list, or in the model folder when downloading is off.
    ///
    /// # Errors
    /// If the service cannot be reached or a required pattern matches nothing.
    pub fn plan(&self, origins: &[Origin]) -> Result<Plan, HubError> {
        let mut listings = BTreeMap::new();
        let groups = origins.iter().map(|origin| match self.settings.offline {
            Some(variable) => self.local(origin, variable),
            None => {
                let id = &origin.model_id;
                if !listings.contains_key(id) {
                    listings.insert(id.clone(), list(&self.client, &self.settings, id)?);
                }
                self.remote(origin, &listings[id])
            }
        });
        Ok(Plan { groups: groups.collect::<Result<_, _>>()? })
    }

    /// Downloads what is missing, in the order of the plan; a file that has its listed size already stays.
    ///
    /// A broken download is continued a few times and, by a later call, where it ended.
    ///
    /// # Errors
    /// If a file cannot be fetched completely, its checksum differs, or it cannot be written.
    pub fn download(&self, plan: &Plan, on: &mut dyn FnMut(Event)) -> Result<(), HubError> {
        for file in plan.groups.iter().flatten().filter(|file| !file.is_there()) {
            let Some((url, remote)) = &file.remote else { continue };
            let (client, retry_wait) = (&self.client, self.settings.retry_wait);
            Transfer { client, url, remote, path: &file.path, retry_wait }.run(on)?;
        }
        Ok(())
    }

    fn remote(&self, origin: &Origin, listing: &[RemoteFile]) -> Result<Vec<PlannedFile>, HubError> {
        let (id, folder) = (&origin.model_id, self.folder(&origin.model_id));
        let matching = listing.iter().filter(|file| origin.matches(&file.path));
        let files: Vec<PlannedFile> = matching
            .map(|file| PlannedFile {
                path: folder.join(&file.path),
                remote: Some((file_url(&self.settings, id, &file.path), file.clone())),
            })
            .collect();
        if files.is_empty() && origin.need == Need::Required {
            let available = listing.iter().map(|file| file.path.clone()).collect();
            let (model_id, pattern) = (id.clone(), origin.pattern.clone());
            return Err(HubError::NoMatch { model_id, pattern, available });
        }
        Ok(files)
    }

    fn local(&self, origin: &Origin, variable: &'static str) -> Result<Vec<PlannedFile>, HubError> {
        let folder = self.folder(&origin.model_id);
        let mut paths = Vec::new();
        collect_files(&folder, &mut paths)?;
        paths.retain(|path| {
            let relative = path.strip_prefix(&folder).unwrap_or(path).to_string_lossy().replace('\\', "/");
            origin.matches(&relative) && !relative.ends_with(PART)
        });
        if paths.is_empty() && origin.need == Need::Required {
            let (model_id, pattern) = (origin.model_id.clone(), origin.pattern.clone());
            return Err(HubError::Offline { model_id, pattern, folder, variable });
        }
        paths.sort();
        Ok(paths.into_iter().map(|path| PlannedFile { path, remote: None }).collect())
    }
}

/// Ending of partial files.
pub(crate) const PART: &str = ".part";

impl Plan {
    /// The local files of the origin with this index, sorted; they exist once the plan is downloaded.
    pub fn paths(&self, origin: usize) -> impl Iterator<Item = &Path> {
        self.groups[origin].iter().map(|file| file.path.as_path())
    }

    /// Bytes that [`Hub::download`] would fetch now.
    pub fn missing_bytes(&self) -> u64 {
        self.missing().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(bytes))
    }

    /// The files that [`Hub::download`] would fetch now, with the bytes that are missing, sorted by path.
    pub fn missing(&self) -> impl Iterator<Item = (&Path, u64)> {
        let absent = self.groups.iter().flatten().filter(|file| !file.is_there());
        let files: BTreeMap<&Path, u64> =
            absent.map(|file| (file.path.as_path(), file.missing_bytes())).collect();
        files.into_iter()
    }
}

impl PlannedFile {
    fn is_there(&self) -> bool {
        match &self.remote {
            Some((_, remote)) => length(&self.path) == Some(remote.size_bytes),
            None => true,
        }
    }

    fn missing_bytes(&self) -> u64 {
        match &self.remote {
            Some((_, remote)) if !self.is_there() => {
                remote.size_bytes.saturating_sub(length(&part_path(&self.path)).unwrap_or(0))
            }
            _ => 0,
        }
    }
}

fn length(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().filter(|file| file.is_file()).map(|file| file.len())
}

/// Every file below a folder; none where there is no folder.
fn collect_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), HubError> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder).map_err(HubError::io(folder))? {
        let path = entry.map_err(HubError::io(folder))?.path();
        if path.is_dir() {
            collect_files(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}
