//! A whole report from invented numbers: what its files promise to their readers. The page stays in the target
//! directory's `tmp/sample_report` to be looked at.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fewstep_data::image::Picture;
use fewstep_report::{Chart, Curve, Grid, GridRow, Report, ReportError, Row, Stage};
use fewstep_testkit::golden;
use serde_json::Value;

const KEYS: [&str; 10] = [
    "name",
    "num_inference_steps",
    "cfg_scale",
    "latent_mse",
    "psnr_db",
    "kid_teacher",
    "kid_real",
    "top1",
    "top5",
    "secs_per_image",
];

/// Name, steps, guidance, then the numbers from `latent_mse` on.
type Invented = (&'static str, usize, f64, [Option<f64>; 7]);

fn rows() -> Vec<Row> {
    let all = |numbers: [f64; 7]| numbers.map(Some);
    let invented: [Invented; 9] = [
        ("teacher", 50, 4.0, [None, None, None, Some(0.0413), Some(0.84), Some(0.96), Some(2.61)]),
        ("undistilled", 4, 1.0, all([0.0917, 14.2, 0.3127, 0.3561, 0.31, 0.52, 0.104])),
        ("undistilled", 4, 4.0, all([0.0744, 15.3, 0.2215, 0.2893, 0.42, 0.66, 0.208])),
        ("student LoRA", 1, 1.0, all([0.0702, 15.6, 0.2408, 0.2754, 0.47, 0.71, 0.026])),
        ("student LoRA", 2, 1.0, all([0.0418, 18.0, 0.1106, 0.1420, 0.65, 0.85, 0.052])),
        ("student LoRA", 4, 1.0, all([0.0266, 20.1, 0.0471, 0.0822, 0.77, 0.93, 0.103])),
        ("student full", 2, 1.0, all([0.0361, 18.8, 0.0895, 0.1204, 0.70, 0.88, 0.052])),
        ("student full", 4, 1.0, all([0.0219, 21.0, 0.0352, 0.0704, 0.80, 0.94, 0.102])),
        ("student full", 8, 1.0, all([0.0231, 20.8, 0.0340, 0.0699, 0.80, 0.95, 0.205])),
    ];
    let row = |(name, num_inference_steps, cfg_scale, numbers): Invented| {
        let [latent_mse, psnr_db, kid_teacher, kid_real, top1, top5, secs_per_image] = numbers;
        let name = name.to_owned();
        Row {
            name,
            num_inference_steps,
            cfg_scale,
            latent_mse,
            psnr_db,
            kid_teacher,
            kid_real,
            top1,
            top5,
            secs_per_image,
        }
    };
    invented.into_iter().map(row).collect()
}

/// The picture with its colours turned `turn` times and `amount` of invented noise.
fn variation(picture: &Picture, turn: usize, amount: i32) -> Picture {
    let mut varied = picture.clone();
    for (index, (from, to)) in picture.rgb.chunks_exact(3).zip(varied.rgb.chunks_exact_mut(3)).enumerate() {
        for (channel, value) in to.iter_mut().enumerate() {
            let noise = (index as i32 * 7919 + channel as i32 * 104_729) % 101 - 50;
            *value = (i32::from(from[(channel + turn) % 3]) + noise * amount / 50).clamp(0, 255) as u8;
        }
    }
    varied
}

fn grid(title: &str, prompts: &[&str], picture: &Picture) -> Grid {
    let columns = ["teacher 50 steps", "undistilled 4", "LoRA 2", "LoRA 4", "full 2", "full 4", "full 8"];
    let noise = [0, 90, 45, 20, 40, 15, 12];
    let row = |(index, prompt): (usize, &&str)| GridRow {
        prompt: (*prompt).into(),
        seed: Some(9000 + index as u64),
        pictures: noise.iter().map(|amount| Some(variation(picture, index, *amount))).collect(),
    };
    let columns = columns.map(String::from).to_vec();
    Grid { title: title.into(), columns, rows: prompts.iter().enumerate().map(row).collect() }
}

fn curve(name: &str, count: usize, level: f64) -> Curve {
    let noise = |index: usize| ((index * 7919 % 1009) as f64 / 1009.0 - 0.5) * 0.5;
    let y = |index: usize| {
        level * (0.25 + 0.75 * (-(index as f64) / (0.15 * count as f64)).exp()) * (1.0 + noise(index))
    };
    Curve { name: name.into(), points: (0..count).map(|index| (index as f64, y(index))).collect() }
}

fn chart(title: &str, log_y: bool, curves: Vec<Curve>) -> Chart {
    let (x_label, y_label) = ("optimiser steps".into(), "loss".into());
    Chart { title: title.into(), x_label, y_label, log_y, smoothing: 40, curves }
}

fn sample() -> Report {
    let picture =
        Picture::load(&golden("judge/square.png")).expect("the golden picture is in the repository");
    let prompts =
        ["3D style, fox face", "flat style, <fox> & \"friends\" with a very long caption", "立体风格，狐狸"];
    let stage = |(name, secs): (&str, f64)| Stage { name: name.into(), secs };
    Report {
        title: "Sample report: every number here is invented".into(),
        summary: "The numbers and noise of this page are made up to look at its layout.\n\nIn four steps the student draws \
                  nearly the teacher's pictures; the same model undistilled does not."
            .into(),
        counts: BTreeMap::from([("prompts".into(), 60), ("pictures_per_row".into(), 240)]),
        seeds: (9000..9004).collect(),
        rows: rows(),
        grids: vec![grid("Held-out prompts", &prompts, &picture), grid("Seen prompts", &prompts[..1], &picture)],
        charts: vec![
            chart("Direct distillation", true, vec![curve("LoRA", 600, 0.1), curve("full", 600, 0.07)]),
            chart("Teacher", false, vec![curve("flow matching", 6000, 0.9)]),
        ],
        stages: [("teacher pictures", 312.4), ("LoRA student", 184.0), ("full student", 171.0), ("evaluation", 8.25)]
            .map(stage)
            .to_vec(),
        notes: vec!["Invented data.".into(), "KID at 64 px, features at 128 px.".into()],
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("sample_report")
}

#[test]
fn the_json_has_the_promised_keys_and_reads_back() {
    let report = sample();
    let path = folder().join(Report::JSON_FILE);
    report.write_json(&path).unwrap();
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let keys: Vec<&String> = json["rows"][0].as_object().unwrap().keys().collect();
    assert_eq!(keys, KEYS);
    assert_eq!(json["rows"][0]["latent_mse"], Value::Null);
    assert_eq!(json["counts"]["prompts"], 60);
    assert_eq!(json["seeds"][3], 9003);
    assert_eq!(json["charts"][1]["curves"][0]["points"].as_array().unwrap().len(), 6000);
    assert_eq!(json["stages"][0]["secs"], 312.4);
    let rows: Vec<Row> = serde_json::from_value(json["rows"].clone()).unwrap();
    assert_eq!(rows, report.rows);
}

#[test]
fn the_page_stands_alone_and_escapes_prompts() {
    let path = folder().join(Report::HTML_FILE);
    sample().write_html(&path).unwrap();
    let page = std::fs::read_to_string(path).unwrap();
    assert!(page.contains("&lt;fox&gt; &amp; &quot;friends&quot;") && !page.contains("<fox>"));
    for foreign in ["<script", "<link", "http://", "https://", "url(", "@import"] {
        assert!(!page.contains(foreign), "the page contains {foreign}");
    }
    assert_eq!(page.matches("<img ").count(), page.matches("src=\"data:image/png;base64,").count());
    // Four rows of seven pictures.
    assert_eq!(page.matches("<img ").count(), 28);
    // The best of each of seven columns, once; two of them (full 4 and full 8 in top-1) share a place.
    assert_eq!(page.matches("<td class=\"best\">").count(), 8);
}

#[test]
fn parts_that_are_empty_have_no_heading() {
    let path = folder().join("empty.html");
    Report { title: "t".into(), ..Report::default() }.write_html(&path).unwrap();
    assert!(!std::fs::read_to_string(path).unwrap().contains("<h2>"));
}

#[test]
fn a_path_that_cannot_be_written_is_named() {
    let blocked = folder().join("blocked");
    std::fs::create_dir_all(blocked.join("report.html")).unwrap();
    let error = sample().write_html(&blocked.join("report.html")).unwrap_err();
    assert!(
        matches!(error, ReportError::Write { .. }) && error.to_string().contains("report.html"),
        "{error}"
    );
}
