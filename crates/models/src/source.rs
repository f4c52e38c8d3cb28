//! Where a model's files are: a folder in the official layout, or weight files given one by one.
//!
//! Nothing is read before it is asked for, so a caller that needs one component needs only its files.
//! Given files are recognised by the keys in them, never by their names; the small files that go with
//! them (configs, scheduler, tokenizer) are looked for around them as the official layout has them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use fewstep_data::bounded;

use crate::ModelError;
use crate::family::Kind;
use crate::model::KINDS;
use crate::weights::{WeightFiles, component_files, is_weights, read_info};

/// The metadata of a safetensors file.
pub(crate) type Info = BTreeMap<String, String>;

/// The files of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSource {
    place: Place,
    /// Given by itself; otherwise part of the model folder.
    tokenizer: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
enum Place {
    /// The folder that holds `model_index.json`.
    Folder(PathBuf),
    Files(GivenFiles),
}

/// Weight files that were given one by one.
#[derive(Clone, Debug, PartialEq)]
struct GivenFiles {
    /// The class a `model_index.json` would name.
    pipeline_class: &'static str,
    /// Components that such a model has.
    components: &'static [&'static str],
    /// Component → its files, sorted.
    weights: BTreeMap<&'static str, Vec<PathBuf>>,
    /// Folders that may be the model folder, in the order the files were given.
    folders: Vec<PathBuf>,
}

impl<P: AsRef<Path> + ?Sized> From<&P> for ModelSource {
    /// A model folder in the official layout.
    fn from(folder: &P) -> Self {
        Self { place: Place::Folder(folder.as_ref().to_owned()), tokenizer: None }
    }
}

impl fmt::Display for ModelSource {
    /// The folder, or the first file of each component.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Folder(folder) => write!(f, "{}", folder.display()),
            Place::Files(given) => {
                let first = given.weights.values().filter_map(|files| files.first());
                let names: Vec<String> = first.map(|path| path.display().to_string()).collect();
                f.write_str(&names.join(", "))
            }
        }
    }
}

impl ModelSource {
    /// Weight files given one by one: a group for each component, holding its file or its shards.
    ///
    /// # Errors
    /// If a file cannot be read, a group is of no known component, two are of the same one, or no family has all of them.
    pub fn from_files(groups: &[Vec<PathBuf>]) -> Result<Self, ModelError> {
        let opened: Vec<WeightFiles> =
            groups.iter().map(|group| open_all(group)).collect::<Result<_, _>>()?;
        let kind = family_of(&opened)?;
        let mut given = GivenFiles {
            pipeline_class: kind.pipeline_class(),
            components: kind.components(),
            weights: BTreeMap::new(),
            folders: Vec::new(),
        };
        for files in &opened {
            given.add(kind.component_of(files).expect("the family has all of them"), files)?;
        }
        Ok(Self { place: Place::Files(given), tokenizer: None })
    }

    /// The same model with the tokenizer files of a folder.
    pub fn with_tokenizer(self, folder: PathBuf) -> Self {
        Self { tokenizer: Some(folder), ..self }
    }

    /// Patterns of the small files in a repository that loading needs beside the weights a pattern names.
    pub fn companions(pattern: &str) -> Vec<String> {
        let common = ["model_index.json", "scheduler/*", "tokenizer*/*"].map(str::to_owned);
        let folder = pattern.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        let beside = ["config.json", "*.safetensors.index.json"].map(|name| format!("{folder}{name}"));
        common.into_iter().chain(beside).collect()
    }

    /// Whether it holds every component: a model folder does, given files may be of some only.
    pub fn is_whole(&self) -> bool {
        match &self.place {
            Place::Folder(_) => true,
            Place::Files(given) => {
                given.components.iter().all(|component| given.weights.contains_key(component))
            }
        }
    }

    /// The model folder, unless files were given.
    pub(crate) fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Folder(folder) => Some(folder),
            Place::Files(_) => None,
        }
    }

    /// The files that were given for a component; none for a model folder.
    pub(crate) fn component_files(&self, component: &str) -> &[PathBuf] {
        match &self.place {
            Place::Folder(_) => &[],
            Place::Files(given) => given.weights.get(component).map_or(&[], Vec::as_slice),
        }
    }

    /// The class of the pipeline, and the file that says so.
    pub(crate) fn pipeline_class(&self) -> Result<(PathBuf, String), ModelError> {
        let folder = match &self.place {
            Place::Files(given) => return Ok((PathBuf::new(), given.pipeline_class.to_owned())),
            Place::Folder(folder) => folder,
        };
        let path = required(folder, "model_index.json")?;
        let text = bounded::read_text(&path).map_err(ModelError::io(&path))?;
        let index: serde_json::Value = serde_json::from_str(&text)
            .map_err(|error| ModelError::Config { path: path.clone(), reason: error.to_string() })?;
        let class = index["_class_name"].as_str().unwrap_or("(none)").to_owned();
        Ok((path, class))
    }

    /// A component's `config.json`.
    ///
    /// # Errors
    /// If there is none; the error says where it was looked for.
    pub(crate) fn config(&self, component: &'static str) -> Result<PathBuf, ModelError> {
        let relative = format!("{component}/config.json");
        match &self.place {
            Place::Folder(folder) => required(folder, &relative),
            Place::Files(given) => {
                let beside = given.own_folder(component).map(|folder| folder.join("config.json"));
                let around = given.folders.iter().map(|folder| folder.join(&relative));
                first_of(beside.into_iter().chain(around), &relative)
            }
        }
    }

    /// Bytes of the model's files that `counts` accepts, told their component and whether they are weights; of given
    /// files, the weights alone.
    ///
    /// # Errors
    /// If a folder cannot be read.
    pub(crate) fn bytes(&self, counts: &dyn Fn(&str, bool) -> bool) -> Result<u64, ModelError> {
        let size = |path: &Path| std::fs::metadata(path).map(|file| file.len()).map_err(ModelError::io(path));
        let mut bytes = 0;
        match &self.place {
            Place::Folder(folder) => {
                for path in files_below(folder)? {
                    let component = path.parent().map(name_of).unwrap_or_default();
                    if counts(&component, is_weights(&path)) {
                        bytes += size(&path)?;
                    }
                }
            }
            Place::Files(given) => {
                for (_, files) in given.weights.iter().filter(|(component, _)| counts(component, true)) {
                    for path in files {
                        bytes += size(path)?;
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// Bytes of a component's weight files; 0 where there are none.
    ///
    /// # Errors
    /// If a folder cannot be read.
    pub fn weight_bytes(&self, component: &str) -> Result<u64, ModelError> {
        self.bytes(&|name, is_weights| is_weights && name == component)
    }

    /// A component's weights.
    ///
    /// # Errors
    /// If there are none, a shard is missing, or a file is damaged.
    pub(crate) fn weights(&self, component: &'static str) -> Result<WeightFiles, ModelError> {
        match &self.place {
            Place::Folder(folder) => open_all(&[required(folder, component)?]),
            Place::Files(given) => match given.weights.get(component) {
                Some(files) => open_all(files),
                None => Err(ModelError::MissingComponent { component, given: given.all_files() }),
            },
        }
    }

    /// The metadata of a component's weights and the file it stands in, the first of several; `None` where there are no
    /// weights.
    ///
    /// # Errors
    /// If a file cannot be read or its header is damaged.
    pub fn info(&self, component: &str) -> Result<Option<(PathBuf, Info)>, ModelError> {
        let files = match &self.place {
            Place::Folder(folder) => match component_files(&folder.join(component)) {
                Ok(files) => files,
                Err(ModelError::NoModelFolder { .. }) => Vec::new(),
                Err(error) => return Err(error),
            },
            Place::Files(_) => self.component_files(component).to_vec(),
        };
        let read = |path: PathBuf| Ok((path.clone(), read_info(&path)?));
        files.into_iter().next().map(read).transpose()
    }

    /// The text of a small file that every model of a family shares, and its path for messages; `published` where
    /// files were given and none is around them.
    ///
    /// # Errors
    /// If the file is missing from a model folder or cannot be read.
    pub(crate) fn text_or(&self, relative: &str, published: &str) -> Result<(PathBuf, String), ModelError> {
        let path = match &self.place {
            Place::Folder(folder) => required(folder, relative)?,
            Place::Files(given) => {
                let mut candidates = given.folders.iter().map(|folder| folder.join(relative));
                match candidates.find(|path| path.exists()) {
                    Some(path) => path,
                    None => return Ok((relative.into(), published.to_owned())),
                }
            }
        };
        let text = bounded::read_text(&path).map_err(ModelError::io(&path))?;
        Ok((path, text))
    }

    /// The folder of a tokenizer's files, by its name in the official layout. One that was given by itself is the first.
    ///
    /// # Errors
    /// If there is none; the error says where it was looked for.
    pub(crate) fn tokenizer(&self, name: &str) -> Result<PathBuf, ModelError> {
        match (&self.tokenizer, &self.place) {
            (Some(folder), _) if name == "tokenizer" => Ok(folder.clone()),
            (_, Place::Folder(folder)) => required(folder, name),
            (_, Place::Files(given)) => first_of(given.folders.iter().map(|folder| folder.join(name)), name),
        }
    }

    /// Every weight file with its name in the official layout, sorted by component.
    ///
    /// # Errors
    /// If the folder cannot be read or a shard is missing.
    pub fn weight_files(&self) -> Result<Vec<(String, PathBuf)>, ModelError> {
        let mut components: Vec<(String, Vec<PathBuf>)> = Vec::new();
        match &self.place {
            Place::Folder(folder) => {
                for subfolder in subfolders(folder)? {
                    match component_files(&subfolder) {
                        Ok(files) => components.push((name_of(&subfolder), files)),
                        Err(ModelError::NoModelFolder { .. }) => {} // no component with weights
                        Err(error) => return Err(error),
                    }
                }
            }
            Place::Files(given) => {
                let listed = given.weights.iter();
                components.extend(listed.map(|(name, files)| ((*name).to_owned(), files.clone())));
            }
        }
        let named = |(component, files): (String, Vec<PathBuf>)| {
            files.into_iter().map(move |path| (format!("{component}/{}", name_of(&path)), path))
        };
        Ok(components.into_iter().flat_map(named).collect())
    }
}

impl GivenFiles {
    fn add(&mut self, component: &'static str, files: &WeightFiles) -> Result<(), ModelError> {
        let mut paths = files.files();
        paths.sort();
        for path in &paths {
            let folder = parent(path);
            for folder in [parent(&folder), folder] {
                if !self.folders.contains(&folder) {
                    self.folders.push(folder);
                }
            }
        }
        match self.weights.insert(component, paths) {
            None => Ok(()),
            Some(first) => Err(ModelError::SameComponent {
                component,
                first: first[0].clone(),
                second: self.weights[component][0].clone(),
            }),
        }
    }

    /// The folder of a component's files, unless it is shared with another component.
    fn own_folder(&self, component: &str) -> Option<PathBuf> {
        let folder = parent(self.weights.get(component)?.first()?);
        let mut others = self.weights.iter().filter(|(name, _)| **name != component);
        let shared = others.any(|(_, files)| files.iter().any(|path| parent(path) == folder));
        (!shared).then_some(folder)
    }

    fn all_files(&self) -> Vec<PathBuf> {
        self.weights.values().flatten().cloned().collect()
    }
}

/// The files or folders that together hold one component, in the official layout whichever they are in.
fn open_all(paths: &[PathBuf]) -> Result<WeightFiles, ModelError> {
    let files = WeightFiles::open_all(paths)?;
    let rules = KINDS.iter().find_map(|kind| kind.original_layout(&files));
    Ok(match rules {
        Some(rules) => files.officially(rules),
        None => files,
    })
}

/// The first family that has a component for all of these weights.
fn family_of(groups: &[WeightFiles]) -> Result<&'static dyn Kind, ModelError> {
    let has = |kind: &&dyn Kind, files: &WeightFiles| kind.component_of(files).is_some();
    if let Some(kind) = KINDS.iter().find(|kind| groups.iter().all(|files| has(kind, files))) {
        return Ok(*kind);
    }
    // Either nobody knows some of the weights, or they are of several families.
    let unknown = groups.iter().find(|files| !KINDS.iter().any(|kind| has(kind, files)));
    let path = |files: &WeightFiles| files.path().to_owned();
    Err(match unknown {
        Some(files) => {
            let keys = files.keys().take(4).map(str::to_owned).collect();
            ModelError::UnknownWeights { path: path(files), keys }
        }
        None => ModelError::MixedFamilies { given: groups.iter().map(path).collect() },
    })
}

/// A path of a model folder that must exist.
fn required(folder: &Path, relative: &str) -> Result<PathBuf, ModelError> {
    let path = folder.join(relative);
    if path.exists() {
        return Ok(path);
    }
    Err(ModelError::NoModelFolder { path: folder.to_owned(), missing: relative.to_owned() })
}

fn first_of(candidates: impl Iterator<Item = PathBuf>, what: &str) -> Result<PathBuf, ModelError> {
    let looked: Vec<PathBuf> = candidates.collect();
    match looked.iter().find(|path| path.exists()) {
        Some(path) => Ok(path.clone()),
        None => Err(ModelError::NotBeside { what: what.to_owned(), looked }),
    }
}

/// Every file in a folder and the folders below it.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let entries = std::fs::read_dir(folder).map_err(ModelError::io(folder))?;
    let mut files: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file()).collect();
    for subfolder in subfolders(folder)? {
        files.extend(files_below(&subfolder)?);
    }
    Ok(files)
}

fn subfolders(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let entries = std::fs::read_dir(folder).map_err(ModelError::io(folder))?;
    let mut folders: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect();
    folders.sort();
    Ok(folders)
}

/// The folder of a path; `.` for a bare name, `..` for `.`.
fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ if path == Path::new(".") => "..".into(),
        _ => ".".into(),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
