//! Training runs that are killed at any instant, or stopped by signals, end with the bits of runs that never were.
//!
//! `FEWSTEP_KILLS` is the number of processes killed in each of the tests that kill, [`KILLS`] unless it is given. What
//! was counted is printed: `FEWSTEP_KILLS=50 cargo test --test interrupted -- --nocapture killed`.

#![cfg(unix)] // Signals, and the command that sends them.
#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use fewstep_data::atomic::is_unfinished;
use fewstep_testkit::{folder_files, write_tiny_configs};
use tempfile::TempDir;

/// Processes killed in each test unless the environment says otherwise.
const KILLS: usize = 8;

/// A run that uses all that a run can have: averages, accumulation, a schedule, samples, encoded data on disk.
const RECIPE: &str = r#"
model = "model"
dataset_base_path = "data"
dataset_memory_mib = 0
batch_size = 2
gradient_accumulation_steps = 2
max_steps = 24
learning_rate = 0.01
lr_schedule = "cosine"
warmup_steps = 3
ema_decay = 0.9
save_steps = 2
keep = 3
log_steps = 3
sample_steps = 5
sample_prompts = ["a square"]
sample_num_inference_steps = 2
"#;

const TRAIN: &str = "train --config recipe.toml";

const LORA: &str = "--lora-base-model transformer --lora-rank 4";

/// A folder with a small model, `model/`, and its pictures of two prompts, `data/`.
struct Fixture {
    folder: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let fixture = Self { folder: tempfile::tempdir().unwrap() };
        write_tiny_configs(&fixture.path("configs"));
        fs::create_dir(fixture.path("pictures")).unwrap();
        let picture = image::RgbImage::from_pixel(16, 16, image::Rgb([40; 3]));
        picture.save(fixture.path("pictures/dark.png")).unwrap();
        fs::write(fixture.path("pictures/metadata.csv"), "image,prompt\ndark.png,square\n").unwrap();
        fixture.succeed(
            "train --task sft --initial-weights random --trainable-models text_encoder,transformer --model configs \
             --dataset-base-path pictures --max-steps 2 --learning-rate 0.02 --output-path start",
        );
        fs::rename(fixture.path("start/model"), fixture.path("model")).unwrap();
        fs::write(fixture.path("prompts.txt"), "a dark square\na light square of another length\n").unwrap();
        fixture.succeed(
            "generate --model model --prompts prompts.txt --images-per-prompt 3 --height 16 --width 16 \
             --num-inference-steps 3 --output data",
        );
        fs::write(fixture.path("recipe.toml"), RECIPE).unwrap();
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the program in the fixture's folder.
    fn start(&self, arguments: &str) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fewstep"));
        command.args(arguments.split_whitespace()).current_dir(self.folder.path());
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn succeed(&self, arguments: &str) {
        let ended = self.start(arguments).wait_with_output().unwrap();
        assert!(ended.status.success(), "{arguments}: {}", said(&ended));
    }

    fn newest_checkpoint(&self, run: &str) -> u64 {
        let names = fs::read_dir(self.path(run).join("checkpoints")).into_iter().flatten().flatten();
        let step = |name: String| name.strip_prefix("step-")?.parse().ok();
        names.filter_map(|entry| step(entry.file_name().into_string().ok()?)).max().unwrap_or(0)
    }

    /// Lines of a run's log, the header not among them.
    fn logged(&self, run: &str) -> usize {
        let log = fs::read_to_string(self.path(run).join("loss.csv")).unwrap_or_default();
        log.lines().skip(1).count()
    }

    /// Starts the program and waits until it has made more of its run's log than there was before, or has ended.
    fn start_and_wait_for_steps(&self, arguments: &str, run: &str) -> Child {
        let before = self.logged(run);
        let mut child = self.start(arguments);
        let began = Instant::now();
        while self.logged(run) <= before && child.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < Duration::from_secs(300), "no step in five minutes");
            sleep(Duration::from_millis(1));
        }
        child
    }

    /// What a run leaves, without the times in it.
    fn outcome(&self, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = folder_files(&self.path(run));
        let is_part = |path: &Path| path.iter().any(|part| is_unfinished(&part.to_string_lossy()));
        let unfinished: Vec<&PathBuf> = files.keys().filter(|path| is_part(path)).collect();
        assert!(unfinished.is_empty(), "left behind: {unfinished:?}");
        files.retain(|path, _| {
            let first = path.iter().next().unwrap().to_string_lossy();
            let compared = ["model", "checkpoints", "samples", "cache", "loss.csv"];
            first.ends_with(".safetensors") || compared.contains(&&*first)
        });
        let log = files.get_mut(Path::new("loss.csv")).unwrap();
        *log = without_rate(&String::from_utf8_lossy(log)).into_bytes();
        files
    }

    #[track_caller]
    fn assert_same_outcome(&self, run: &str, expected: &BTreeMap<PathBuf, Vec<u8>>, what: &str) {
        let found = self.outcome(run);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
        for (path, bytes) in &found {
            assert!(*bytes == expected[path], "{what}: {} differs", path.display());
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The log without its last column, the samples per second; the peer's log has no such column.
fn without_rate(log: &str) -> String {
    let timed = log.starts_with("step,epoch");
    let line = |line: &str| if timed { line.rsplit_once(',').unwrap().0.to_owned() } else { line.to_owned() };
    log.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// Numbers without a pattern; which instants they lead to depends on the machine anyway.
struct Chance(u64);

impl Chance {
    /// From 0 to `end`, the end excluded.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// When a process is killed.
enum Instants {
    /// After a time.
    After(Duration),
    /// So many sightings of a file or folder that is being written, one a poll, after it began.
    WhileWriting(u64),
}

impl Instants {
    fn draw(chance: &mut Chance, whole: Duration) -> Self {
        match chance.below(2) {
            0 => Self::After(whole.mul_f64(chance.below(1000) as f64 / 1000.0)),
            _ => Self::WhileWriting(1 + chance.below(40)),
        }
    }

    /// Waits for the instant, or for the process to end by itself.
    fn wait(&self, child: &mut Child, run: &Path) -> Option<ExitStatus> {
        let (began, mut sightings) = (Instant::now(), 0);
        loop {
            if let Some(ended) = child.try_wait().unwrap() {
                return Some(ended);
            }
            let due = match self {
                Self::After(time) => began.elapsed() >= *time,
                Self::WhileWriting(count) => {
                    sightings += u64::from(is_writing(run));
                    sightings >= *count
                }
            };
            if due {
                return None;
            }
            sleep(Duration::from_micros(100));
        }
    }
}

/// Whether there is something unfinished in a run's folder or in one directly below it.
fn is_writing(run: &Path) -> bool {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let unfinished = |entry: &fs::DirEntry| is_unfinished(&entry.file_name().to_string_lossy());
    entries(run).any(|entry| unfinished(&entry) || entries(&entry.path()).any(|below| unfinished(&below)))
}

/// Starts a run again and again and kills it, until so many processes are dead; runs that came to their end are compared
/// with one that was left alone.
fn kill_and_compare(flags: &str, seed: u64) {
    let kills = std::env::var("FEWSTEP_KILLS").map_or(KILLS, |count| count.parse().unwrap());
    let fixture = Fixture::new();
    let command = |run: &str| format!("{TRAIN} {flags} --output-path {run}");
    let began = Instant::now();
    fixture.succeed(&command("whole"));
    let whole = began.elapsed();
    let expected = fixture.outcome("whole");
    let (mut chance, mut killed, mut runs) = (Chance(seed), 0, 0);
    while killed < kills {
        let (run, mut newest, mut killed_here) = (format!("run-{runs}"), 0, 0);
        runs += 1;
        loop {
            let mut child = fixture.start(&command(&run));
            let instant = Instants::draw(&mut chance, whole);
            let ended = if killed < kills { instant.wait(&mut child, &fixture.path(&run)) } else { None };
            if killed == kills || ended.is_some() {
                let output = child.wait_with_output().unwrap();
                assert!(output.status.success(), "{run}: {}", said(&output));
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            (killed, killed_here) = (killed + 1, killed_here + 1);
            let now = fixture.newest_checkpoint(&run);
            assert!(now >= newest, "{run}: the checkpoint of step {newest} is lost, the newest is {now}");
            newest = now;
        }
        fixture.assert_same_outcome(&run, &expected, &format!("{run}, killed {killed_here} times"));
        fs::remove_dir_all(fixture.path(&run)).unwrap();
    }
    eprintln!("killed {killed} processes of {runs} runs, every run ended as the one left alone: {flags}");
}

#[test]
fn killed_distillation_of_adapters_ends_with_the_same_bits() {
    kill_and_compare(&format!("--task direct_distill {LORA}"), 1);
}

#[test]
fn killed_distillation_of_full_weights_ends_with_the_same_bits() {
    kill_and_compare("--task direct_distill", 2);
}

#[test]
fn killed_flow_matching_of_adapters_ends_with_the_same_bits() {
    kill_and_compare(&format!("--task sft {LORA}"), 3);
}

#[test]
fn killed_flow_matching_of_full_weights_ends_with_the_same_bits() {
    kill_and_compare("--task sft", 4);
}

/// With the peer's files on the way, its order of random numbers and its log.
#[test]
fn killed_runs_in_the_peers_layout_end_with_the_same_bits() {
    kill_and_compare("--compat diffsynth", 5);
}

/// Sends a signal as a terminal would; the standard library can only kill. A process that has ended, and has not been
/// waited for, takes it too.
fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// A run that is met at work and logs every step.
const STEADY: &str =
    "train --config recipe.toml --task sft --lr-schedule constant --sample-steps 0 --log-steps 1";

#[test]
fn the_first_interrupt_saves_and_the_next_process_continues_there() {
    let fixture = Fixture::new();
    let command = format!("{STEADY} --save-steps 0 --max-steps 5000 --output-path run");
    for name in ["INT", "TERM"] {
        let before = fixture.newest_checkpoint("run");
        let child = fixture.start_and_wait_for_steps(&command, "run");
        signal(&child, name);
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{}", said(&ended));
        let step = fixture.newest_checkpoint("run");
        assert!(step > before, "nothing was saved");
        assert_eq!(fixture.logged("run") as u64, step);
        assert!(said(&ended).contains(&format!("stopped after step {step};")), "{}", said(&ended));
    }
}

#[test]
fn a_second_interrupt_leaves_at_once_and_harms_nothing() {
    let fixture = Fixture::new();
    let command = |run: &str| format!("{STEADY} --max-steps 100 --output-path {run}");
    fixture.succeed(&command("whole"));
    let expected = fixture.outcome("whole");
    for pause_ms in [0, 3, 10] {
        let child = fixture.start_and_wait_for_steps(&command("run"), "run");
        signal(&child, "INT");
        sleep(Duration::from_millis(pause_ms));
        signal(&child, "INT");
        let ended = child.wait_with_output().unwrap();
        // The run may have come to its end by itself.
        assert!(matches!(ended.status.code(), Some(130 | 0)), "{:?} {}", ended.status, said(&ended));
    }
    fixture.succeed(&command("run"));
    fixture.assert_same_outcome("run", &expected, "interrupted twice");
}

#[test]
fn an_interrupt_while_the_demo_draws_is_obeyed_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = Command::new(env!("CARGO_BIN_EXE_fewstep"));
    command.args(["demo", "--quick", "--output"]).arg(folder.path().join("demo")).arg("--root").arg(root);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    lines
        .find(|line| line.as_ref().unwrap().contains("Drawing"))
        .expect("teacher pictures are drawn")
        .unwrap();
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert!(!rest.iter().any(|line| line.contains("Distilling")), "{rest:?}");
    assert!(rest.concat().contains("the same command continues"), "{rest:?}");
}

#[test]
fn two_processes_do_not_work_in_one_folder() {
    let fixture = Fixture::new();
    let command = |max_steps: u64| format!("{STEADY} --max-steps {max_steps} --output-path run");
    let mut first = fixture.start_and_wait_for_steps(&command(5000), "run");
    let second = fixture.start(&command(5000)).wait_with_output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let expected = format!("another process works in this folder: {}\nhint:", first.id());
    assert!(said(&second).contains(&expected), "{}", said(&second));
    first.kill().unwrap();
    first.wait().unwrap();
    // The lock died with its process.
    fixture.succeed(&command(1));
}
