//! The bundled set written out as the kind of data set that users bring.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{EmojiSet, Item, Language};
use crate::DataError;
use crate::atomic::NewFolder;
use crate::metadata::{CaptionedRow, write_captioned_csv};

impl EmojiSet {
    /// Writes the set as an ordinary data set, so that it is read like any other.
    ///
    /// `metadata.csv` with columns `image,prompt` names the training pictures, below `images/`; `held_out.csv`
    /// names the others, below `held_out/`. A picture has a row for each language. `groups` limits the set to
    /// concepts of these groups; empty takes all. The folder appears only when it is complete.
    ///
    /// # Errors
    /// When no concept has one of the groups, or the folder holds something already or cannot be written.
    pub fn write_training_folder(
        &self,
        folder: &Path,
        languages: &[Language],
        groups: &[&str],
    ) -> Result<(), DataError> {
        refuse_taken(folder)?;
        let chosen = self.of_groups(groups)?;
        let made = NewFolder::begin(folder).map_err(DataError::io(folder))?;
        for part in [Part::Training, Part::HeldOut] {
            let of_part = |item: &Item<'_>| chosen[item.concept] && item.held_out == (part == Part::HeldOut);
            let items: Vec<_> = self.items().filter(of_part).collect();
            self.write_part(made.part(), part, &items, languages)?;
        }
        made.publish().map_err(DataError::io(folder))
    }

    /// For each concept whether it has one of the groups.
    fn of_groups(&self, groups: &[&str]) -> Result<Vec<bool>, DataError> {
        let unknown = |group: &&&str| !self.concepts.iter().any(|concept| concept.group == **group);
        if let Some(found) = groups.iter().find(unknown) {
            let expected: BTreeSet<String> =
                self.concepts.iter().map(|concept| concept.group.clone()).collect();
            return Err(DataError::Group {
                found: (*found).into(),
                expected: expected.into_iter().collect(),
            });
        }
        let chosen = |group: &str| groups.is_empty() || groups.contains(&group);
        Ok(self.concepts.iter().map(|concept| chosen(&concept.group)).collect())
    }

    fn write_part(
        &self,
        folder: &Path,
        part: Part,
        items: &[Item<'_>],
        languages: &[Language],
    ) -> Result<(), DataError> {
        let (metadata, images) = part.names();
        let path = folder.join(images);
        fs::create_dir_all(&path).map_err(DataError::io(&path))?;
        let mut rows = Vec::new();
        for item in items {
            let image = format!("{images}/{}_{}.png", self.concepts[item.concept].hex, item.style.name());
            let path = folder.join(&image);
            // Synced one by one, thousands of pictures would take minutes on some disks.
            fs::write(&path, item.picture.to_png()).map_err(DataError::io(&path))?;
            let row = |&language| CaptionedRow::of_image(image.clone(), item.caption(language));
            rows.extend(languages.iter().map(row));
        }
        write_captioned_csv(&folder.join(metadata), &rows)
    }
}

/// What is trained on and what is kept from it.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Training,
    HeldOut,
}

impl Part {
    /// The metadata file and the folder of pictures.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Training => ("metadata.csv", "images"),
            Self::HeldOut => ("held_out.csv", "held_out"),
        }
    }
}

fn refuse_taken(folder: &Path) -> Result<(), DataError> {
    let taken = fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    if taken { Err(DataError::FolderTaken { path: folder.into() }) } else { Ok(()) }
}
