//! Containers that the program ffmpeg reads and writes. It runs as a process of its own, so that a file made to break a
//! decoder breaks that process; pictures come and go through pipes, as pnm and as raw RGB.
//!
//! No shell takes part, paths are given as `file:PATH` and so are never read as options or addresses, and of ffmpeg's
//! readers only those of the containers named here are allowed: playlists would lead to other files and hosts.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Frame, Frames, Video};
use crate::image::{MAX_PIXELS, MAX_SIDE_PX, Picture, Size};
use crate::{DataError, atomic};

/// ffmpeg's names of the containers in [`super::FFMPEG_EXTENSIONS`].
const DEMUXERS: &str = "mov,matroska,avi,asf,flv";

/// How long the program may give nothing. A frame takes milliseconds; a file that keeps it busy is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is read from the program at once, and how many of these may wait.
const CHUNK_BYTES: usize = 1 << 16;
const WAITING_CHUNKS: usize = 16;

/// What is kept of the program's complaints.
const MAX_COMPLAINT_BYTES: u64 = 4096;

/// The installed programs.
#[derive(Clone)]
pub(super) struct Ffmpeg {
    pub(super) ffmpeg: PathBuf,
    pub(super) ffprobe: PathBuf,
    pub(super) patience: Duration,
}

impl Ffmpeg {
    /// The programs on the search path, to read or write `file`.
    pub(super) fn find(file: &Path, container: &str) -> Result<Self, DataError> {
        Self::find_in(&env::var_os("PATH").unwrap_or_default(), file, container)
    }

    /// As [`Self::find`], on another search path.
    pub(super) fn find_in(search_path: &OsStr, file: &Path, container: &str) -> Result<Self, DataError> {
        let found = |name: &str| {
            let program = format!("{name}{}", env::consts::EXE_SUFFIX);
            env::split_paths(search_path)
                .map(|folder| folder.join(&program))
                .find(|program| program.is_file())
        };
        let programs = (found("ffmpeg"), found("ffprobe"));
        let (Some(ffmpeg), Some(ffprobe)) = programs else {
            return Err(DataError::NoFfmpeg { path: file.into(), container: container.into() });
        };
        Ok(Self { ffmpeg, ffprobe, patience: PATIENCE })
    }

    /// The first `most` frames of a file.
    pub(super) fn open(&self, path: &Path, most: usize) -> Result<Frames, DataError> {
        let broken = |reason: String| DataError::Video { path: path.into(), reason };
        std::fs::metadata(path).map_err(DataError::io(path))?;
        let rate = self.rate(path).map_err(broken)?;
        let mut command = Command::new(&self.ffmpeg);
        command.args(["-nostdin", "-xerror"]);
        input(&mut command, path);
        command.args(["-map", "0:V:0", "-frames:v", &most.to_string(), "-c:v", "ppm", "-pix_fmt", "rgb24"]);
        command.args(["-f", "image2pipe", "pipe:1"]);
        let mut output =
            BufReader::new(Output::of(command, self.patience).map_err(|fault| broken(fault.to_string()))?);
        let path = path.to_path_buf();
        let pictures = std::iter::from_fn(move || {
            let frame = next_frame(&mut output, &path).transpose()?;
            Some(frame.map(|picture| Frame { picture, shown: None }))
        });
        Ok(Frames { pictures: Box::new(pictures), rate })
    }

    /// The mean frame rate that a file's first video track states; an error says why ffprobe does not read the file.
    fn rate(&self, path: &Path) -> Result<Option<f64>, String> {
        let mut command = Command::new(&self.ffprobe);
        command.args(["-select_streams", "V:0", "-show_entries", "stream=avg_frame_rate"]);
        command.args(["-of", "default=noprint_wrappers=1:nokey=1"]);
        input(&mut command, path);
        let mut output = Output::of(command, self.patience).map_err(|fault| fault.to_string())?;
        let mut text = String::new();
        (&mut output)
            .take(CHUNK_BYTES as u64)
            .read_to_string(&mut text)
            .map_err(|fault| fault.to_string())?;
        output.finish()?;
        match text.lines().next() {
            Some(rate) => Ok(fraction(rate)),
            None => Err("it has no video track".into()),
        }
    }

    /// Writes a video with these options of ffmpeg's, atomically.
    pub(super) fn write(
        &self,
        video: &Video,
        path: &Path,
        frames_per_second: f64,
        options: &[&str],
    ) -> io::Result<()> {
        let Size { height, width } = video.size();
        atomic::write_beside(path, |temporary| {
            let mut command = Command::new(&self.ffmpeg);
            command.args(["-hide_banner", "-loglevel", "error", "-f", "rawvideo", "-pixel_format", "rgb24"]);
            command.args(["-video_size", &format!("{width}x{height}")]);
            command.args(["-framerate", &frames_per_second.to_string(), "-i", "pipe:0"]);
            command.args(options).arg(file_address(temporary));
            let mut process =
                command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
            let complaints = complaints(&mut process);
            let mut input = process.stdin.take().expect("standard input was asked for");
            let sent = video.frames().iter().try_for_each(|frame| input.write_all(&frame.rgb));
            drop(input);
            let status = process.wait()?;
            checked(status, complaints.join().unwrap_or_default()).map_err(io::Error::other)?;
            sent
        })
    }
}

/// Says little, takes little, reads local files alone and no container but ours.
fn input(command: &mut Command, path: &Path) {
    command.args(["-hide_banner", "-loglevel", "error", "-protocol_whitelist", "file"]);
    command.args(["-threads", "1", "-max_pixels", &MAX_PIXELS.to_string()]);
    command.args(["-format_whitelist", DEMUXERS, "-i"]).arg(file_address(path));
}

pub(super) fn file_address(path: &Path) -> OsString {
    let mut address = OsString::from("file:");
    address.push(path);
    address
}

/// `25/1` or `30000/1001`; `0/0` where nobody knows.
fn fraction(text: &str) -> Option<f64> {
    let (above, below) = text.trim().split_once('/')?;
    let rate = above.parse::<f64>().ok()? / below.parse::<f64>().ok()?;
    (rate.is_finite() && rate > 0.0).then_some(rate)
}

/// The next picture of a stream of binary pnm files; `None` at its end.
fn next_frame(output: &mut BufReader<Output>, path: &Path) -> Result<Option<Picture>, DataError> {
    let broken = |reason: String| DataError::Video { path: path.into(), reason };
    if output.fill_buf().map_err(|fault| broken(fault.to_string()))?.is_empty() {
        // It ends well with a file that is cut off between two frames, and only says so.
        let complaints = output.get_mut().finish().map_err(broken)?;
        return if complaints.is_empty() { Ok(None) } else { Err(broken(complaints)) };
    }
    let cut = |fault: io::Error| broken(format!("ffmpeg ended within a frame: {fault}"));
    let size = pnm_size(output).map_err(cut)?;
    if size.width.max(size.height) > MAX_SIDE_PX || size.width.saturating_mul(size.height) > MAX_PIXELS {
        return Err(DataError::TooLarge { path: path.into(), found: size });
    }
    let mut rgb = vec![0; 3 * size.width * size.height];
    output.read_exact(&mut rgb).map_err(cut)?;
    Ok(Some(Picture { width: size.width, height: size.height, rgb }))
}

/// `P6`, width and height, and 255, each on its line.
fn pnm_size(output: &mut BufReader<Output>) -> io::Result<Size> {
    const MAX_LINE_BYTES: u64 = 32;
    let mut lines = String::new();
    for _ in 0..3 {
        output.by_ref().take(MAX_LINE_BYTES).read_line(&mut lines)?;
    }
    let words: Vec<&str> = lines.split_whitespace().collect();
    let side = |word: &str| word.parse::<usize>().ok().filter(|side| *side > 0);
    match words[..] {
        ["P6", width, height, "255"] => side(width).zip(side(height)),
        _ => None,
    }
    .map(|(width, height)| Size { height, width })
    .ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("found {lines:?}, expected a pnm header"))
    })
}

/// What a process writes to its standard output. Waits for it so long and no longer; dropped, it ends the process.
struct Output {
    process: Child,
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: io::Cursor<Vec<u8>>,
    complaints: Option<JoinHandle<String>>,
    patience: Duration,
}

impl Output {
    fn of(mut command: Command, patience: Duration) -> io::Result<Self> {
        let mut process =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut pipe = process.stdout.take().expect("standard output was asked for");
        let complaints = Some(complaints(&mut process));
        let (send, chunks) = sync_channel(WAITING_CHUNKS);
        thread::spawn(move || {
            loop {
                let mut chunk = vec![0; CHUNK_BYTES];
                let read = pipe.read(&mut chunk);
                let is_last = !matches!(read, Ok(1..));
                let sent = read.map(|bytes| {
                    chunk.truncate(bytes);
                    chunk
                });
                // A chunk without bytes is the end; a reader that is gone wants no more.
                if send.send(sent).is_err() || is_last {
                    return;
                }
            }
        });
        Ok(Self { process, chunks, chunk: io::Cursor::default(), complaints, patience })
    }

    /// Waits for the process, whose output has ended: what it complained about, which is an error if it failed.
    fn finish(&mut self) -> Result<String, String> {
        let status = self.process.wait().map_err(|fault| fault.to_string())?;
        let complaints =
            self.complaints.take().and_then(|complaints| complaints.join().ok()).unwrap_or_default();
        checked(status, complaints)
    }
}

impl Read for Output {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.chunk.read(buffer)?;
        if read > 0 || buffer.is_empty() {
            return Ok(read);
        }
        match self.chunks.recv_timeout(self.patience) {
            Ok(chunk) => self.chunk = io::Cursor::new(chunk?),
            Err(RecvTimeoutError::Disconnected) => return Ok(0),
            Err(RecvTimeoutError::Timeout) => {
                let secs = self.patience.as_secs_f64();
                let reason = format!("ffmpeg gave nothing for {secs} s");
                return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
            }
        }
        self.chunk.read(buffer)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // It may have ended by itself; either way it leaves nothing behind.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads what a process complains about, to its end and keeping the beginning.
fn complaints(process: &mut Child) -> JoinHandle<String> {
    let mut pipe = process.stderr.take().expect("standard error was asked for");
    thread::spawn(move || {
        let mut kept = Vec::new();
        // Where a pipe breaks, the exit status tells enough.
        let _ = pipe.by_ref().take(MAX_COMPLAINT_BYTES).read_to_end(&mut kept);
        let _ = io::copy(&mut pipe, &mut io::sink());
        one_line(&String::from_utf8_lossy(&kept))
    })
}

/// Complaints behind each other, without the names and addresses of the parts of ffmpeg that they come from.
fn one_line(complaints: &str) -> String {
    let without_part = |line: &'_ str| match line.split_once("] ") {
        Some((part, text)) if part.starts_with('[') => text.to_owned(),
        _ => line.to_owned(),
    };
    let lines: Vec<String> = complaints.lines().map(without_part).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { String::new() } else { format!("ffmpeg: {}", lines.join("; ")) }
}

/// What a process complained about, which is an error if it failed.
fn checked(status: ExitStatus, complaints: String) -> Result<String, String> {
    match (status.success(), complaints.is_empty()) {
        (true, _) => Ok(complaints),
        (false, true) => Err(format!("ffmpeg failed ({status})")),
        (false, false) => Err(complaints),
    }
}
