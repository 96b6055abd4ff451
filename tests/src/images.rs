//! Container images made from what is on the machine: no registry, no download.
//!
//! `docker.io/local/busybox:1` is the distribution's static busybox with all its applets;
//! `docker.io/local/pause:1` is the few lines of C below. Both are one OCI image layout in a tar
//! file, as `ctr images import` reads it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::bed::{lock, run};

pub const BUSYBOX: &str = "docker.io/local/busybox:1";
pub const PAUSE: &str = "docker.io/local/pause:1";

/// Waits for its end and collects the dead of a shared process namespace.
const PAUSE_SOURCE: &str = r"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int s) { (void)s; _exit(0); }
static void reap(int s) { (void)s; while (waitpid(-1, 0, WNOHANG) > 0) {} }
int main(void) { signal(SIGINT, end); signal(SIGTERM, end); signal(SIGCHLD, reap); for (;;) pause(); }
";

/// Writes `images.tar` to `dir`, unless it is there, and gives its path.
pub fn archive(dir: &Path) -> Result<PathBuf> {
    // Tests that run beside each other share it: one of them makes it, none sees half of it.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = lock(&TURN);
    let path = dir.join("images.tar");
    if path.is_file() {
        return Ok(path);
    }
    let mut layout = Layout::default();
    let busybox = layout.layer(&busybox_files()?.finish());
    layout.image(BUSYBOX, &[&busybox], in_bin(json!({"Cmd": ["/bin/sh"]})))?;
    let pause = layout.layer(&pause_files(dir)?.finish());
    layout.image(PAUSE, &[&pause], in_bin(json!({"Cmd": ["/pause"]})))?;
    layout.write(&path)?;
    Ok(path)
}

/// The settings of an image whose programs are all in `/bin`.
fn in_bin(mut settings: Value) -> Value {
    settings["Env"] = json!(["PATH=/bin"]);
    settings["WorkingDir"] = json!("/");
    settings
}

/// The distribution's static busybox with all its applets, and the directories of a system.
pub fn busybox_files() -> Result<Tar> {
    let program = Path::new("/bin/busybox");
    let bytes = fs::read(program).context("/bin/busybox (Debian package busybox-static)")?;
    let applets = run(Command::new(program).arg("--list"))?;
    let mut tar = Tar::default();
    for dir in ["bin", "etc", "proc", "sys", "dev", "root", "var", "www"] {
        tar.dir(dir, 0o755);
    }
    tar.dir("tmp", 0o1777);
    tar.file("bin/busybox", &bytes, 0o755);
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        tar.link(&format!("bin/{applet}"), "busybox");
    }
    tar.file(
        "etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
        0o644,
    );
    tar.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n", 0o644);
    Ok(tar)
}

/// The pause program alone.
pub fn pause_files(dir: &Path) -> Result<Tar> {
    let mut tar = Tar::default();
    tar.file("pause", &compiled(dir, "pause", PAUSE_SOURCE)?, 0o755);
    Ok(tar)
}

/// A static program of a few lines of C.
pub fn compiled(dir: &Path, name: &str, text: &str) -> Result<Vec<u8>> {
    let (source, program) = (dir.join(format!("{name}.c")), dir.join(name));
    fs::write(&source, text)?;
    run(Command::new("cc")
        .args(["-Os", "-static", "-s", "-o"])
        .arg(&program)
        .arg(&source))
    .with_context(|| format!("build {name} (Debian packages gcc and libc6-dev)"))?;
    fs::read(&program).with_context(|| format!("read {}", program.display()))
}

/// An OCI image layout (image-spec 1.1, image-layout.md) under construction.
#[derive(Default)]
pub struct Layout {
    tar: Tar,
    manifests: Vec<Value>,
    /// The blobs directory is made with the first blob.
    begun: bool,
}

impl Layout {
    /// Adds a layer, for [`Layout::image`].
    pub fn layer(&mut self, tar: &[u8]) -> Value {
        self.blob("application/vnd.oci.image.layer.v1.tar", tar)
    }

    /// Adds an image of those layers, the lowest first, with those settings (`config` of an image's
    /// configuration: `Cmd`, `Env`, `User` …).
    pub fn image(&mut self, name: &str, layers: &[&Value], settings: Value) -> Result<()> {
        let contents: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": settings,
            "rootfs": {"type": "layers", "diff_ids": contents},
        });
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            &serde_json::to_vec(&config)?,
        );
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        let mut entry = self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            &serde_json::to_vec(&manifest)?,
        );
        entry["annotations"] = json!({"io.containerd.image.name": name});
        self.manifests.push(entry);
        Ok(())
    }

    /// Adds a blob and gives its descriptor.
    fn blob(&mut self, kind: &str, bytes: &[u8]) -> Value {
        if !self.begun {
            self.tar.dir("blobs", 0o755);
            self.tar.dir("blobs/sha256", 0o755);
            self.begun = true;
        }
        let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
        let hex: String = digest
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.tar.file(&format!("blobs/sha256/{hex}"), bytes, 0o644);
        json!({"mediaType": kind, "digest": format!("sha256:{hex}"), "size": bytes.len()})
    }

    /// Writes the archive to that path, whole or not at all.
    pub fn write(self, path: &Path) -> Result<()> {
        let part = path.with_extension("part");
        fs::write(&part, self.finish()?).with_context(|| format!("write {}", part.display()))?;
        fs::rename(&part, path).with_context(|| format!("write {}", path.display()))
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": self.manifests,
        });
        self.tar
            .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644);
        self.tar
            .file("index.json", &serde_json::to_vec(&index)?, 0o644);
        Ok(self.tar.finish())
    }
}

/// The name of this machine's architecture as Go and OCI spell it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A tar archive in the ustar format (POSIX.1-1988), with a fixed time so that equal content has
/// equal digests.
#[derive(Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

const BLOCK: usize = 512;

impl Tar {
    pub fn dir(&mut self, name: &str, mode: u32) {
        self.entry(&format!("{name}/"), b"", mode, b'5', "");
    }

    pub fn file(&mut self, name: &str, content: &[u8], mode: u32) {
        self.entry(name, content, mode, b'0', "");
    }

    pub fn link(&mut self, name: &str, target: &str) {
        self.entry(name, b"", 0o777, b'2', target);
    }

    /// Names here are short: at most 100 bytes, which the first field holds.
    fn entry(&mut self, name: &str, content: &[u8], mode: u32, kind: u8, target: &str) {
        let mut header = [0u8; BLOCK];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, format!("{mode:07o}").as_bytes());
        put(108, b"0000000");
        put(116, b"0000000");
        put(124, format!("{:011o}", content.len()).as_bytes());
        put(136, b"00000000000");
        put(148, b"        ");
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(content);
        self.bytes
            .resize(self.bytes.len().next_multiple_of(BLOCK), 0);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_header_and_whole_blocks() {
        let mut tar = Tar::default();
        tar.file("a", &[7; 513], 0o644);
        assert_eq!(tar.bytes.len(), 3 * BLOCK);
        let sum: u32 = tar.bytes[..BLOCK]
            .iter()
            .enumerate()
            .map(|(at, byte)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*byte)
                }
            })
            .sum();
        assert_eq!(&tar.bytes[148..154], format!("{sum:06o}").as_bytes());
        assert_eq!(tar.finish().len(), 5 * BLOCK);
    }
}
