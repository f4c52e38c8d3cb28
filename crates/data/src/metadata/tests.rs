use std::fs;

use super::*;

const DISTILL_HEADER: &str = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale\n";

/// Metadata of a file of this name and content, with its folder shown as `.`.
fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Metadata, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    Metadata::read(&path).map_err(|error| without_folder(&error, folder.path()))
}

fn without_folder(error: &DataError, folder: &Path) -> String {
    error.to_string().replace(&folder.display().to_string(), ".")
}

fn values(metadata: &Metadata) -> Vec<Vec<(&str, &str)>> {
    metadata
        .rows
        .iter()
        .map(|row| row.values.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect())
        .collect()
}

/// What is wrong with a row of teacher data.
fn distill_error(row: &str) -> String {
    let metadata = read("m.csv", format!("{DISTILL_HEADER}a.png,first,0,cpu,4,1\n{row}\n")).unwrap();
    let error = metadata.distill_rows().unwrap_err();
    without_folder(&error, metadata.path.parent().unwrap())
}

#[test]
fn csv_keeps_commas_quotes_and_newlines_inside_quotes() {
    let text = "\u{feff}image,prompt\r\na.png,\"a cat, \"\"sitting\"\"\nand looking\"\r\nb.png,\r\n";
    let metadata = read("m.csv", text).unwrap();
    assert_eq!(
        values(&metadata),
        [
            [("image", "a.png"), ("prompt", "a cat, \"sitting\"\nand looking")],
            [("image", "b.png"), ("prompt", "")]
        ]
    );
    assert_eq!(metadata.rows.iter().map(|row| row.number).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn the_three_formats_give_the_same_rows() {
    let csv = read("m.csv", "image,prompt,seed\na.png,猫,7\nb.png,,8\n").unwrap();
    let json =
        r#"[{"image": "a.png", "prompt": "猫", "seed": 7}, {"image": "b.png", "prompt": "", "seed": 8}]"#;
    let json = read("m.json", json).unwrap();
    let jsonl = "\u{feff}{\"image\": \"a.png\", \"prompt\": \"猫\", \"seed\": 7}\r\n\r\n{\"image\": \"b.png\", \"prompt\": \"\", \"seed\": 8}\r\n";
    let jsonl = read("m.JSONL", jsonl).unwrap();
    assert_eq!(values(&csv), values(&json));
    assert_eq!(values(&csv), values(&jsonl));
}

#[test]
fn json_null_is_a_missing_value_and_a_list_stays_json() {
    let metadata = read("m.json", r#"[{"image": ["a.png", "b.png"], "prompt": null}]"#).unwrap();
    assert_eq!(values(&metadata), [[("image", r#"["a.png","b.png"]"#)]]);
    assert!(metadata.rows[0].text("prompt").is_err());
}

#[test]
fn distill_rows_are_written_and_read_back_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.csv");
    let row = |prompt: &str, seed, rand_device, cfg_scale| DistillRow {
        media: Media::Image,
        file: "images/0.png".into(),
        prompt: prompt.into(),
        seed,
        rand_device,
        num_inference_steps: 4,
        cfg_scale,
        embedded_guidance: None,
        num_frames: None,
    };
    let rows =
        [row("a \"cat\",\nsitting", u64::MAX, RandDevice::Cpu, 1.0), row("", 0, RandDevice::Cuda, 4.1)];
    write_distill_csv(&path, &rows).unwrap();
    assert_eq!(Metadata::read(&path).unwrap().distill_rows().unwrap(), rows);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.starts_with(DISTILL_HEADER), "{text}");
    assert!(text.contains("18446744073709551615,cpu,4,1.0\n"), "{text}");
    let told = [DistillRow { embedded_guidance: Some(3.5), ..rows[0].clone() }, rows[1].clone()];
    write_distill_csv(&path, &told).unwrap();
    assert_eq!(Metadata::read(&path).unwrap().distill_rows().unwrap(), told);
}

#[test]
fn a_csv_without_rows_still_has_its_header() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.csv");
    write_captioned_csv(&path, &[]).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "image,prompt\n");
    assert_eq!(Metadata::read(&path).unwrap().captioned_rows().unwrap(), []);
}

#[test]
fn a_missing_column_is_named_with_those_found() {
    let metadata = read("m.csv", "image,caption\na.png,a cat\n").unwrap();
    let error = without_folder(&metadata.captioned_rows().unwrap_err(), metadata.path.parent().unwrap());
    assert_eq!(
        error,
        "./m.csv, row 1: column `prompt` is missing; found image, caption\n\
         hint: add a column `prompt`; names are compared letter by letter"
    );
    let error =
        without_folder(&metadata.rows[0].integer("seed").unwrap_err(), metadata.path.parent().unwrap());
    assert_eq!(
        error,
        "./m.csv, row 1: column `seed` is missing; found image, caption\n\
         hint: distillation needs the teacher's settings of every picture; `generate` writes them"
    );
}

#[test]
fn a_seed_that_is_no_integer_from_0_is_named() {
    for seed in ["", "4.0", "-1", "x1", "18446744073709551616", "1e3"] {
        assert_eq!(
            distill_error(&format!("b.png,second,{seed},cpu,4,1")),
            format!(
                "./m.csv, row 2, column `seed`: found `{seed}`, expected an integer from 0 to 18446744073709551615\n\
                 hint: write it without sign, decimal point and quotes; pandas turns a column of integers with gaps into fractions"
            )
        );
    }
}

#[test]
fn a_guidance_that_is_no_number_from_0_is_named() {
    for cfg_scale in ["", "four", "-1", "NaN", "inf"] {
        assert_eq!(
            distill_error(&format!("b.png,second,0,cpu,4,{cfg_scale}")),
            format!(
                "./m.csv, row 2, column `cfg_scale`: found `{cfg_scale}`, expected a number from 0\n\
                 hint: write it like 1 or 4.5; cfg_scale 1 is guidance off"
            )
        );
    }
}

#[test]
fn an_unknown_generator_and_no_steps_are_named() {
    assert_eq!(
        distill_error("b.png,second,0,mps,4,1"),
        "./m.csv, row 2, column `rand_device`: found `mps`, expected cpu or cuda\n\
         hint: it names the generator that drew the teacher's noise"
    );
    assert_eq!(
        distill_error("b.png,second,0,cpu,0,1"),
        "./m.csv, row 2, column `num_inference_steps`: found `0`, expected an integer from 1 to 10000\n\
         hint: it is the number of sampling steps the student shall take"
    );
    assert!(
        distill_error("b.png,second,0,cpu,1000000000,1").contains("found `1000000000`, expected an integer")
    );
}

#[test]
fn a_picture_outside_the_base_folder_is_refused() {
    for image in
        ["", ".", "/etc/a.png", "../a.png", "a/../../a.png", "a/..", "..\\a.png", "C:\\a.png", "a\0.png"]
    {
        assert_eq!(
            distill_error(&format!("{image},second,0,cpu,4,1")),
            format!(
                "./m.csv, row 2, column `image`: found `{image}`, expected a path relative to the dataset base path that does not leave it\n\
                 hint: move the file below the dataset base path, or name a folder above both as the base path; \
                 folders are parted by /"
            )
        );
    }
    for image in ["a.png", "./a.png", "a/../b.png", "猫 1.png"] {
        assert!(is_below(image), "{image}");
    }
}

#[test]
fn a_missing_picture_is_named_with_row_column_and_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.csv");
    fs::write(&path, "image,prompt\nm.csv,itself\nimages/b.png,a cat\n").unwrap();
    let error = Metadata::read(&path).unwrap().media_files(folder.path()).unwrap_err();
    assert_eq!(
        without_folder(&error, folder.path()),
        "./m.csv, row 2, column `image`: found no file ./images/b.png\n\
         hint: files are looked for relative to the dataset base path"
    );
}

#[test]
fn broken_files_are_named_with_their_row() {
    let error = |name, content: &[u8]| read(name, content).unwrap_err();
    assert_eq!(
        error("m.txt", b""),
        "./m.txt: no metadata format: found extension `txt`, expected csv, json or jsonl"
    );
    assert_eq!(
        error("m.csv", b"image,prompt\na.png,b\nb.png,a cat, sitting\n"),
        "./m.csv, row 2: found 3 values, expected 2 as in the header\nhint: put values with commas into double quotes"
    );
    assert_eq!(error("m.csv", b"image,seed,image\n"), "./m.csv: column `image` appears twice in the header");
    assert_eq!(
        error("m.json", b"{}"),
        "./m.json: invalid type: map, expected a list of objects at line 1 column 0"
    );
    assert_eq!(
        error("m.json", b"[{}, 3]"),
        "./m.json, row 2: invalid type: integer `3`, expected an object at line 1 column 6"
    );
    assert_eq!(
        error("m.jsonl", b"{}\n[]\n"),
        "./m.jsonl, row 2: invalid type: sequence, expected an object at line 1 column 0"
    );
    assert_eq!(
        error("m.json", b"[{\"a\": 1, \"a\": 2}]"),
        "./m.json, row 1: column `a` appears twice at line 1 column 17"
    );
    assert_eq!(error("m.json", b"[{}] {}"), "./m.json: trailing characters at line 1 column 6");
    assert_eq!(
        error("m.jsonl", b"{}\n{\"a\"\n"),
        "./m.jsonl, row 2: EOF while parsing an object at line 1 column 4"
    );
    assert!(error("m.csv", b"image\n\xff\n").starts_with("./m.csv: not UTF-8: "));
    let missing = Metadata::read(Path::new("nowhere/m.csv")).unwrap_err().to_string();
    assert!(missing.starts_with("nowhere/m.csv: No such file"), "{missing}");
}

#[test]
fn rows_without_end_are_refused_by_their_columns() {
    let wide = format!("image{}\na\n", ",x".repeat(1_000_000));
    assert_eq!(read("m.csv", wide).unwrap_err(), "./m.csv: found 1000001 columns, expected at most 1000");
    let fields: Vec<String> = (0..2000).map(|at| format!("\"{at}\":0")).collect();
    let error = read("m.jsonl", format!("{{{}}}\n", fields.join(","))).unwrap_err();
    assert!(error.starts_with("./m.jsonl, row 1: found 1001 columns, expected at most 1000"), "{error}");
}

#[test]
fn json_nested_without_end_is_refused_and_not_followed() {
    let deep = |open: &str, count| open.repeat(count);
    for (name, text) in [
        ("m.json", deep("[", 1_000_000)),
        ("m.json", format!("[{}", deep("{\"a\":", 1_000_000))),
        ("m.jsonl", deep("{\"a\":", 1_000_000)),
    ] {
        let error = read(name, text).unwrap_err();
        assert!(
            error.contains("recursion limit exceeded") || error.contains("expected an object"),
            "{error}"
        );
    }
}

#[test]
fn a_gigantic_cell_is_one_value() {
    let prompt = "x".repeat(10_000_000);
    let metadata = read("m.csv", format!("image,prompt\na.png,\"{prompt}\"\n")).unwrap();
    assert_eq!(metadata.rows[0].text("prompt").unwrap().len(), prompt.len());
}

#[cfg(unix)]
#[test]
fn links_are_followed_inside_the_base_folder_and_refused_out_of_it() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let (base, outside) = (folder.path().join("base"), folder.path().join("outside"));
    for (folder, name) in [(&base, "real"), (&outside, "secret")] {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(name), "x").unwrap();
    }
    symlink("real", base.join("inner.png")).unwrap();
    symlink(outside.join("secret"), base.join("outer.png")).unwrap();
    symlink("../outside", base.join("folder")).unwrap();
    let file = |image: &str| {
        let path = base.join("m.csv");
        fs::write(&path, format!("image,prompt\n{image},x\n")).unwrap();
        Metadata::read(&path).unwrap().media_files(&base)
    };
    assert_eq!(file("inner.png").unwrap(), [(Media::Image, base.join("inner.png"))]);
    for image in ["outer.png", "folder/secret", "folder/../outside/secret"] {
        let error = without_folder(&file(image).unwrap_err(), &fs::canonicalize(folder.path()).unwrap());
        assert!(error.contains("m.csv, row 1: "), "{error}");
        assert!(
            error.contains("leads by a link to ./outside/secret, outside of the dataset base path"),
            "{error}"
        );
        assert!(error.contains("\nhint: copy it below"), "{error}");
    }
    // The base itself may be a link.
    symlink(&base, folder.path().join("link")).unwrap();
    assert!(Metadata::read(&base.join("m.csv")).unwrap().rows[0].media_file(&base).is_err());
    fs::write(base.join("m.csv"), "image,prompt\nreal,x\n").unwrap();
    Metadata::read(&base.join("m.csv")).unwrap().media_files(&folder.path().join("link")).unwrap();
}

/// A row of these columns, of a data set with a picture, a video and a folder of frames.
fn media_of(columns: &str) -> Result<(Media, PathBuf), String> {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path();
    fs::create_dir(base.join("frames")).unwrap();
    for name in ["a.png", "a.webp", "a.gif", "a.MP4", "frames/0.png"] {
        fs::write(base.join(name), "x").unwrap();
    }
    let path = base.join("m.jsonl");
    fs::write(&path, format!("{{{columns}}}")).unwrap();
    let found = Metadata::read(&path).unwrap().rows[0].media_file(base);
    let (media, file) = found.map_err(|error| without_folder(&error, base))?;
    Ok((media, file.strip_prefix(base).unwrap().into()))
}

#[test]
fn a_row_is_about_a_picture_or_a_video() {
    for (columns, media, file) in [
        (r#""image": "a.png""#, Media::Image, "a.png"),
        (r#""image": "a.webp", "video": null"#, Media::Image, "a.webp"),
        (r#""image": "", "video": "a.webp""#, Media::Video, "a.webp"),
        (r#""video": "a.gif""#, Media::Video, "a.gif"),
        (r#""video": "a.MP4", "image": """#, Media::Video, "a.MP4"),
        (r#""video": "frames""#, Media::Video, "frames"),
    ] {
        assert_eq!(media_of(columns).unwrap(), (media, file.into()), "{columns}");
    }
}

#[test]
fn a_row_about_both_or_neither_is_named() {
    let hint = "hint: a row is about a picture or a video; leave the other column empty";
    assert_eq!(
        media_of(r#""image": "a.png", "video": "a.gif""#).unwrap_err(),
        format!(
            "./m.jsonl, row 1: found both columns of `image` and `video`, expected one of them; found columns: image, \
             video\n{hint}"
        )
    );
    for columns in [r#""image": "", "video": """#, r#""picture": "a.png""#, ""] {
        let error = media_of(columns).unwrap_err();
        assert!(error.starts_with("./m.jsonl, row 1: found neither of `image` and `video`, "), "{error}");
    }
}

#[test]
fn a_file_in_the_other_medias_column_is_sent_there() {
    for (columns, column, found, expected) in [
        (r#""image": "a.MP4""#, "image", "a.MP4", "video"),
        (r#""image": "a.gif""#, "image", "a.gif", "video"),
        (r#""image": "frames""#, "image", "frames", "video"),
        (r#""video": "a.png""#, "video", "a.png", "image"),
    ] {
        assert_eq!(
            media_of(columns).unwrap_err(),
            format!(
                "./m.jsonl, row 1, column `{column}`: found `{found}`, which belongs in the column `{expected}`\n\
                 hint: pictures stand in the column `image`; animations, videos and folders of frames in the column `video`"
            )
        );
    }
    let metadata = read("m.csv", "video,prompt\n../a.gif,x\n").unwrap();
    let error = metadata.captioned_rows().unwrap_err().to_string();
    assert!(error.contains("column `video`: found `../a.gif`, expected a path relative to"), "{error}");
    assert!(media_of(r#""video": "b.gif""#).unwrap_err().contains("column `video`: found no file ./b.gif"));
}

#[test]
fn a_video_where_pictures_are_needed_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.gif"), "x").unwrap();
    let path = folder.path().join("m.csv");
    fs::write(&path, "video,prompt\na.gif,x\n").unwrap();
    let error = Metadata::read(&path).unwrap().rows[0].image_file(folder.path()).unwrap_err();
    assert_eq!(
        without_folder(&error, folder.path()),
        "./m.csv, row 1: found the video ./a.gif, expected a picture in the column `image`"
    );
}

#[test]
fn rows_of_videos_are_written_and_read_back_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.csv");
    let row = |media, file: &str, num_frames| DistillRow {
        media,
        file: file.into(),
        prompt: "a cat".into(),
        seed: 7,
        rand_device: RandDevice::Cuda,
        num_inference_steps: 4,
        cfg_scale: 1.0,
        embedded_guidance: None,
        num_frames,
    };
    let mut rows = vec![row(Media::Video, "videos/0.webp", None), row(Media::Video, "videos/1.webp", None)];
    write_distill_csv(&path, &rows).unwrap();
    assert_eq!(Metadata::read(&path).unwrap().distill_rows().unwrap(), rows);
    let text = fs::read_to_string(&path).unwrap();
    let header = "video,prompt,seed,rand_device,num_inference_steps,cfg_scale\n";
    assert!(text.starts_with(&format!("{header}videos/0.webp,a cat,7,cuda,4,1.0\n")), "{text}");
    rows[0].num_frames = Some(81);
    rows.push(row(Media::Image, "images/2.png", Some(1)));
    write_distill_csv(&path, &rows).unwrap();
    assert_eq!(Metadata::read(&path).unwrap().distill_rows().unwrap(), rows);
    let captioned = [
        CaptionedRow { num_frames: Some(5), media: Media::Video, ..CaptionedRow::of_image("a.gif", "x,y") },
        CaptionedRow::of_image("a.png", ""),
    ];
    write_captioned_csv(&path, &captioned).unwrap();
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "image,video,prompt,num_frames\n,a.gif,\"x,y\",5\na.png,,,\n"
    );
    assert_eq!(Metadata::read(&path).unwrap().captioned_rows().unwrap(), captioned);
}

#[test]
fn a_number_of_frames_that_is_none_is_named() {
    let error = |row: &str| {
        let metadata = read("m.csv", format!("image,video,prompt,num_frames\n{row}\n")).unwrap();
        without_folder(&metadata.captioned_rows().unwrap_err(), metadata.path.parent().unwrap())
    };
    for frames in ["0", "100000"] {
        assert_eq!(
            error(&format!(",a.gif,x,{frames}")),
            format!(
                "./m.csv, row 1, column `num_frames`: found `{frames}`, expected an integer from 1 to 99999\nhint: it is the \
                 number of frames that are taken of the row's video"
            )
        );
    }
    assert!(error(",a.gif,x,5.0").contains("column `num_frames`: found `5.0`, expected an integer"));
    assert_eq!(
        error("a.png,,x,5"),
        "./m.csv, row 1, column `num_frames`: found `5`, expected 1, for a picture\nhint: leave it empty, or name a video in \
         the column `video`"
    );
}

#[cfg(unix)]
#[test]
fn a_frame_of_a_folder_that_is_a_link_out_of_the_base_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    fs::create_dir_all(base.join("frames")).unwrap();
    fs::write(base.join("frames/0.png"), "x").unwrap();
    fs::write(folder.path().join("secret.png"), "x").unwrap();
    let path = base.join("m.csv");
    fs::write(&path, "video,prompt\nframes,x\n").unwrap();
    let row = |path: &Path| Metadata::read(path).unwrap().rows[0].media_file(&base);
    row(&path).unwrap();
    std::os::unix::fs::symlink("../../secret.png", base.join("frames/1.png")).unwrap();
    let error = row(&path).unwrap_err().to_string();
    assert!(
        error.contains("leads by a link to ") && error.contains("secret.png, outside of the dataset"),
        "{error}"
    );
}
