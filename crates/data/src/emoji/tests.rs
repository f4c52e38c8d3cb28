use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use super::*;
use crate::metadata::Metadata;

fn bundled() -> EmojiSet {
    EmojiSet::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/emoji")).unwrap()
}

fn prompts(path: PathBuf) -> Vec<String> {
    let folder = path.parent().unwrap().to_path_buf();
    let metadata = Metadata::read(&path).unwrap();
    metadata.media_files(&folder).unwrap();
    metadata.captioned_rows().unwrap().into_iter().map(|row| row.prompt).collect()
}

#[test]
fn every_concept_is_drawn_in_every_style() {
    let set = bundled();
    assert_eq!(set.concepts().len(), 1562);
    assert_eq!(set.items().count(), 3 * 1562);
    assert_eq!((set.training().count(), set.held_out().count()), (4593, 93));
    let hexes: HashSet<_> = set.concepts().iter().map(|concept| &concept.hex).collect();
    assert_eq!(hexes.len(), 1562);
}

#[test]
fn no_held_out_picture_is_trained_on_and_its_concept_is_seen_in_the_other_styles() {
    let set = bundled();
    let trained: HashSet<_> = set.training().map(|item| (item.concept, item.style)).collect();
    for item in set.held_out() {
        let seen = Style::ALL.map(|style| trained.contains(&(item.concept, style)));
        assert_eq!(seen, Style::ALL.map(|style| style != item.style));
    }
    let styles: HashSet<_> = set.held_out().map(|item| item.style).collect();
    assert_eq!(styles.len(), 3);
}

#[test]
fn no_picture_is_trained_on_that_equals_a_held_out_one() {
    let set = bundled();
    let trained: HashSet<_> = set.training().map(|item| &item.picture.rgb).collect();
    assert!(set.held_out().all(|item| !trained.contains(&item.picture.rgb)));
}

#[test]
fn captions_name_style_and_label_and_are_all_different() {
    let set = bundled();
    let apple = set
        .items()
        .find(|item| set.concepts()[item.concept].hex == "1F34E" && item.style == Style::FluentFlat)
        .unwrap();
    assert_eq!(
        (apple.caption_en.as_str(), apple.caption_zh.as_str()),
        ("flat emoji of red apple", "扁平表情：红苹果")
    );
    let captions: HashSet<_> = set.items().flat_map(|item| [item.caption_en, item.caption_zh]).collect();
    assert_eq!(captions.len(), 2 * set.items().count());
}

#[test]
fn pictures_belong_to_their_concept_and_style() {
    let set = bundled();
    let channel_sums = |hex: &str, style: Style| {
        let item =
            set.items().find(|item| set.concepts()[item.concept].hex == hex && item.style == style).unwrap();
        let channel = |at: usize| {
            item.picture.rgb.iter().skip(at).step_by(3).map(|&level| f64::from(level)).sum::<f64>()
        };
        [channel(0), channel(1), channel(2)]
    };
    for style in Style::ALL {
        let [red, _, blue] = channel_sums("1F7E5", style);
        assert!(red > 1.5 * blue, "red square in {style:?}");
        let [red, _, blue] = channel_sums("1F7E6", style);
        assert!(blue > 1.5 * red, "blue square in {style:?}");
    }
}

#[test]
fn a_training_folder_is_an_ordinary_data_set_without_held_out_captions() {
    let set = bundled();
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("emoji");
    set.write_training_folder(&folder, &[Language::English, Language::Chinese], &["food & drink"]).unwrap();
    let training = prompts(folder.join("metadata.csv"));
    let held_out = prompts(folder.join("held_out.csv"));
    let concepts = set.concepts().iter().filter(|concept| concept.group == "food & drink").count();
    assert_eq!(training.len() + held_out.len(), 2 * 3 * concepts);
    assert!(!held_out.is_empty());
    let training: HashSet<_> = training.into_iter().collect();
    assert!(held_out.iter().all(|prompt| !training.contains(prompt)));
    let row = &Metadata::read(&folder.join("metadata.csv")).unwrap().captioned_rows().unwrap()[0];
    let written = Picture::load(&folder.join(&row.file)).unwrap();
    let item = set.training().find(|item| item.caption_en == row.prompt).unwrap();
    assert_eq!(&written, item.picture);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1, "the unfinished folder is gone");
}

#[test]
fn a_folder_that_holds_something_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("mine"), "x").unwrap();
    let error =
        bundled().write_training_folder(folder.path(), &[Language::English], &[]).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "{}: the folder is not empty\nhint: give another folder, or remove this one",
            folder.path().display()
        )
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_concept_without_a_picture_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let concept = r#"{"hex":"1F600","en":"grinning face","zh":"嘿嘿","group":"smileys & emotion"}"#;
    fs::write(folder.path().join(CONCEPTS_FILE), concept).unwrap();
    let empty = zip::ZipWriter::new(std::io::Cursor::new(Vec::new())).finish().unwrap().into_inner();
    let path = folder.path().join(Style::Fluent3d.file_name());
    fs::write(&path, empty).unwrap();
    let error = EmojiSet::open(folder.path()).err().unwrap().to_string();
    let reason = "picture 1F600.webp: specified file not found in archive";
    assert_eq!(error, format!("{}, row 1: {reason}", path.display()));
}

#[test]
fn an_unknown_group_is_answered_with_the_groups_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let written =
        bundled().write_training_folder(&folder.path().join("emoji"), &[Language::English], &["animals"]);
    let error = written.unwrap_err().to_string();
    assert!(
        error.starts_with("no emoji group `animals`, expected one of activities, animals & nature"),
        "{error}"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// A set of one concept whose pictures are these bytes.
fn set_of(bytes: &[u8], hex: &str) -> Result<EmojiSet, String> {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    let line = format!(r#"{{"hex": "{hex}", "en": "x", "zh": "x", "group": "g"}}"#);
    fs::write(folder.path().join(CONCEPTS_FILE), line).unwrap();
    for style in Style::ALL {
        let mut zip = zip::ZipWriter::new(File::create(folder.path().join(style.file_name())).unwrap());
        zip.start_file(format!("{hex}.webp"), zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
        zip.finish().unwrap();
    }
    EmojiSet::open(folder.path()).map_err(|error| error.to_string())
}

#[test]
fn an_entry_that_unpacks_to_more_than_a_picture_is_refused() {
    let error = set_of(&vec![0; 50_000_000], "1F34E").err().unwrap();
    assert!(error.contains("fluent-3d.zip, row 1: picture 1F34E.webp: unpacks to more than"), "{error}");
}

#[test]
fn a_concept_whose_name_leads_out_of_the_folder_is_refused() {
    for hex in ["../../x", "/x", "a", ""] {
        let error = set_of(b"x", hex).err().unwrap();
        assert!(error.contains("concepts.jsonl, row 1: hex is") && error.contains("1F34E-200D"), "{error}");
    }
}

#[test]
fn an_archive_that_is_none_or_cut_off_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/emoji");
    for name in [CONCEPTS_FILE.to_owned(), Style::FluentFlat.file_name(), Style::Noto.file_name()] {
        fs::copy(bundled.join(&name), folder.path().join(&name)).unwrap();
    }
    let whole = fs::read(bundled.join(Style::Fluent3d.file_name())).unwrap();
    for damaged in [&b"no archive"[..], &whole[..whole.len() / 2], &whole[..whole.len() - 30]] {
        fs::write(folder.path().join(Style::Fluent3d.file_name()), damaged).unwrap();
        let error = EmojiSet::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("fluent-3d.zip: "), "{error}");
    }
}
