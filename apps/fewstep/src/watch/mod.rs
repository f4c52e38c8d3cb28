//! `fewstep watch`: a run as a web page on this machine, for whoever has its address.
//!
//! The address holds a random token. The server listens on loopback alone, answers only requests that name it as their
//! host (a page from elsewhere cannot reach it under another name), and only reads: the page, its data, and the sample
//! pictures of the one run.

mod http;
mod routes;
mod token;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::INTERRUPTED;
use crate::interrupt::Interrupts;
use routes::Site;
use token::Token;

/// Flags of `watch`.
#[derive(Args, Clone, Debug)]
pub struct WatchArgs {
    /// Folder of the run (the output_path of `train`); it may appear later
    pub run: PathBuf,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// Loopback address to listen on, such as 127.0.0.1 or ::1; nothing else is accepted
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub address: IpAddr,
}

/// Connections served at once; more are closed unanswered.
const MAX_CONNECTIONS: usize = 32;
/// Time between looks for connections and for Ctrl-C.
const POLL_EVERY: Duration = Duration::from_millis(25);

/// Serves the page until Ctrl-C; prints its address.
///
/// # Errors
/// If the address is no loopback one, the port is taken, or the run is a file.
pub fn run(args: &WatchArgs) -> Result<ExitCode> {
    ensure!(!args.run.is_file(), "{} is a file, expected the folder of a run", args.run.display());
    let listener = listen(args)?;
    let address = listener.local_addr().context("the listener has no address")?;
    let token = Token::random()?;
    let interrupts = Interrupts::take()?;
    println!("http://{address}/{}/", token.text());
    if !args.run.exists() {
        eprintln!("{} is not there yet; the page waits for it", args.run.display());
    }
    eprintln!("watching {} (Ctrl-C ends)", args.run.display());
    let site = Arc::new(Site::new(args.run.clone(), address, token));
    interrupts.during(|stop| serve(&listener, &site, stop));
    Ok(ExitCode::from(INTERRUPTED))
}

fn listen(args: &WatchArgs) -> Result<TcpListener> {
    if !args.address.is_loopback() {
        bail!(
            "--address is {}, expected a loopback address such as 127.0.0.1\nhint: the page is for this machine; from \
             another one, forward the port: ssh -L {port}:127.0.0.1:{port} HOST",
            args.address,
            port = args.port
        );
    }
    let address = SocketAddr::new(args.address, args.port);
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address} (--port 0 takes a free one)"))?;
    listener.set_nonblocking(true).context("cannot wait for connections")?;
    Ok(listener)
}

/// Answers each connection on a thread of its own, until `stop` is set.
fn serve(listener: &TcpListener, site: &Arc<Site>, stop: &AtomicBool) {
    let open = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, peer)) if peer.ip().is_loopback() => answer(stream, site, &open),
            Ok(_) => {}
            // Nobody there; or an error such as too many open files, which passes.
            Err(_) => std::thread::sleep(POLL_EVERY),
        }
    }
}

fn answer(stream: TcpStream, site: &Arc<Site>, open: &Arc<AtomicUsize>) {
    /// Gives its place back, also where the answer panics.
    struct Place(Arc<AtomicUsize>);
    impl Drop for Place {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    open.fetch_add(1, Ordering::Relaxed);
    let place = Place(open.clone());
    if open.load(Ordering::Relaxed) > MAX_CONNECTIONS {
        return;
    }
    let site = site.clone();
    // A reader that has gone away is no error of ours, and without a thread the connection is closed.
    let _ = std::thread::Builder::new().name("watch".into()).spawn(move || {
        let _place = place;
        let _ = http::exchange(stream, |request| site.respond(request));
    });
}
