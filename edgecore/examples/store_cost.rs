//! What the store costs, printed: `cargo run -p edgecore --example store_cost`, in a directory on the
//! disk in question.
//!
//! Bytes are what the kernel was given for the disk (`write_bytes` of `/proc/self/io`), without the
//! file system's own journal.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement stops at the first surprise and prints what it saw"
)]

use std::path::Path;
use std::time::Instant;

use common::ids::{Kind, ObjectKey};
use common::object::Object;
use edgecore::store::Store;
use edgecore::store::desired::{Batch, Desired};

fn number(file: &str, field: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn written() -> u64 {
    number("/proc/self/io", "write_bytes:")
}

fn resident() -> u64 {
    number("/proc/self/status", "VmRSS:")
}

fn secret(name: u64, n: u64, len: usize) -> Object {
    let key = ObjectKey::named(Kind::Secret, "ns", &format!("s-{name}"));
    let text = format!("{n}{}", "x".repeat(len));
    Object::present(key, text.into_bytes())
}

fn main() {
    let at = std::env::current_dir().unwrap();
    let dir = tempfile::tempdir_in(at).unwrap();
    let (before, bytes) = (resident(), written());
    let (store, _) = Store::open(Path::new(dir.path())).unwrap();
    let desired = Desired::load(&store).unwrap();
    let threads = number("/proc/self/status", "Threads:");
    let opening = written() - bytes;
    println!(
        "open: {} KiB resident more, {threads} threads, {opening} B written",
        resident() - before
    );
    for (len, rounds) in [(200, 2000), (2000, 2000), (20_000, 500)] {
        let (start, bytes) = (Instant::now(), written());
        for n in 0..rounds {
            let puts = vec![secret(n % 50, n, len)];
            desired
                .commit(Batch {
                    puts,
                    ..Batch::default()
                })
                .unwrap();
        }
        let each = start.elapsed() / rounds as u32;
        println!(
            "{len} B put: {} B written, {each:?}",
            (written() - bytes) / rounds
        );
    }
    let bytes = written();
    store.close().unwrap();
    println!(
        "close: {} B written; {} KiB resident more",
        written() - bytes,
        resident() - before
    );
}
