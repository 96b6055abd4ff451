//! The images that the upstream suite names, made from what is on the machine: no registry is asked.
//!
//! Each stands for the image of its name as far as the cases look at it. What the suite names and is
//! not here, its cases fail for want of, on every node alike.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bed::run;
use crate::images::{Layout, Tar, busybox_files, compiled, pause_files};
use crate::programs;

/// Says who it runs as, whatever its caller: the file is setuid.
const NNP_SOURCE: &str = r#"
#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\n", (int)geteuid()); return 0; }
"#;

/// Users that the suite's own image has.
const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n\
    user-defined-in-image:x:1000:1000::/home:/bin/sh\n";
const GROUP: &[u8] = b"root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\n\
    group-defined-in-image:x:50000:user-defined-in-image\n";

/// Writes an archive with every image of `names` (`e2e.test --list-images`) that can be made here.
pub(super) fn archive(dir: &Path, agnhost: &Path, names: &str) -> Result<PathBuf> {
    let mut layout = Layout::default();
    let busybox = layout.layer(&shell_files(busybox_files()?)?.finish());
    let agnhost = layout.layer(&agnhost_files(agnhost)?.finish());
    let pause = layout.layer(&pause_files(dir)?.finish());
    let kitten = layout.layer(&picture("kitten.jpg").finish());
    let nautilus = layout.layer(&picture("nautilus.jpg").finish());
    let mut nnp = Tar::default();
    nnp.file("bin/nnp", &compiled(dir, "nnp", NNP_SOURCE)?, 0o6755);
    let nnp = layout.layer(&nnp.finish());

    let entry = json!({"Entrypoint": ["/agnhost"], "Cmd": ["pause"]});
    let site = json!({"Entrypoint": ["/agnhost"], "Cmd": ["test-webserver"]});
    let mut made = 0;
    for name in names.lines().map(str::trim) {
        let kind = name.rsplit_once(':').map_or(name, |(path, _)| path);
        let (layers, settings): (&[&Value], Value) =
            match kind.rsplit('/').next().unwrap_or_default() {
                // One that only a registry with a password gives out.
                _ if name.contains("authenticated") => continue,
                "agnhost" => (&[&busybox, &agnhost], entry.clone()),
                "kitten" => (&[&busybox, &agnhost, &kitten], site.clone()),
                "nautilus" => (&[&busybox, &agnhost, &nautilus], site.clone()),
                "busybox" | "ipc-utils" => (&[&busybox], json!({"Cmd": ["sh"]})),
                "nonroot" => (&[&busybox], json!({"Cmd": ["sh"], "User": "1234"})),
                "nginx" => (&[&busybox], json!({"Cmd": ["httpd", "-f", "-p", "80"]})),
                "nonewprivs" => (&[&busybox, &nnp], json!({"Cmd": ["nnp"]})),
                "pause" => (&[&pause], json!({"Entrypoint": ["/pause"]})),
                _ => continue,
            };
        layout.image(name, layers, everywhere(settings))?;
        made += 1;
    }
    ensure!(
        made > 0,
        "the suite named no image that is known here: {names}"
    );
    let path = dir.join("e2e-images.tar");
    layout.write(&path)?;
    Ok(path)
}

/// Programs where a distribution has them.
fn everywhere(mut settings: Value) -> Value {
    settings["Env"] = json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
    settings
}

/// What the suite asks of a busybox and the distribution's has not: a shell that hands on variables
/// whatever their names, and `printenv`.
fn shell_files(mut tar: Tar) -> Result<Tar> {
    let mut libraries = BTreeSet::new();
    for (name, place) in [
        ("bash", "bin/sh"),
        ("bash", "bin/bash"),
        ("printenv", "bin/printenv"),
    ] {
        let program = programs::on_path(name)?;
        tar.file(place, &fs::read(&program)?, 0o755);
        let linked = run(Command::new("ldd").arg(&program))?;
        let found = linked
            .split_whitespace()
            .filter(|word| word.starts_with('/'));
        libraries.extend(found.map(str::to_owned));
    }
    for library in libraries {
        let bytes = fs::read(&library).with_context(|| format!("read {library}"))?;
        tar.file(library.trim_start_matches('/'), &bytes, 0o755);
    }
    Ok(tar)
}

/// What the suite's image has beside that: the program, users.
fn agnhost_files(program: &Path) -> Result<Tar> {
    let mut tar = Tar::default();
    let bytes = fs::read(program).with_context(|| format!("read {}", program.display()))?;
    tar.file("agnhost", &bytes, 0o755);
    tar.link("agnhost-2", "agnhost");
    tar.dir("uploads", 0o755);
    tar.file("etc/passwd", PASSWD, 0o644);
    tar.file("etc/group", GROUP, 0o644);
    Ok(tar)
}

/// What a site of one picture answers when it is asked for its data.
fn picture(name: &str) -> Tar {
    let mut tar = Tar::default();
    let data = json!({"image": name}).to_string();
    tar.file("data.json", data.as_bytes(), 0o644);
    tar.file(name, b"", 0o644);
    tar
}
