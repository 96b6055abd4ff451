//! Volumes that live on the device: emptyDir and hostPath, and a Pod's group on what it owns.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource, Pod};

use super::mounts;
use crate::node::environment::Environment;
use crate::pods::fields::container_named;
use crate::pods::quantity::units;

/// Not in memory, where it cannot outgrow its file system.
pub fn is_on_disk(source: &EmptyDirVolumeSource) -> bool {
    source.medium.as_deref().unwrap_or_default().is_empty()
}

/// Makes an emptyDir; the error is a sentence for the Pod's Event.
pub(super) fn empty_dir(
    dir: &Path,
    source: &EmptyDirVolumeSource,
    pod: &Pod,
    environment: &Environment,
) -> Result<(), String> {
    let text = |what: &str| {
        let (what, dir) = (what.to_owned(), dir.display().to_string());
        move |e: io::Error| format!("cannot {what} {dir}: {e}")
    };
    match source.medium.as_deref().unwrap_or_default() {
        "" => make_empty(dir).map_err(text("make"))?,
        "Memory" => {
            fs::create_dir_all(dir).map_err(text("make"))?;
            if !mounts::is_mounted(dir).map_err(text("look at"))? {
                let size = memory_size(source, pod, environment);
                mounts::memory(dir, size).map_err(text("mount"))?;
            }
        }
        other => {
            return Err(format!(
                "emptyDir medium {other:?} is not supported on an edge node"
            ));
        }
    }
    if let Some(group) = fs_group(pod) {
        own_by_group(dir, group).map_err(text("give to the fsGroup"))?;
    }
    Ok(())
}

/// Makes the directory open to any user. It takes its name last: one that is there is finished,
/// and what containers made of its mode since is theirs.
fn make_empty(dir: &Path) -> io::Result<()> {
    if dir.exists() {
        return Ok(());
    }
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let new = parent.join(format!(".new-{}", name.to_string_lossy()));
    fs::create_dir_all(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o777))?;
    fs::rename(new, dir)
}

/// The least of the size limit, the containers' memory limits (if all have one) and what the node
/// can give.
fn memory_size(source: &EmptyDirVolumeSource, pod: &Pod, environment: &Environment) -> u64 {
    let asked = source.size_limit.as_ref().and_then(units);
    let asked = asked.and_then(|b| u64::try_from(b).ok()).filter(|b| *b > 0);
    let sizes = [
        asked,
        memory_limit(pod),
        Some(environment.allocatable_memory_bytes),
    ];
    sizes.into_iter().flatten().min().unwrap_or(0)
}

fn memory_limit(pod: &Pod) -> Option<u64> {
    let spec = pod.spec.as_ref()?;
    let limit = |name: &str| {
        let resources = container_named(spec, name)?.resources.as_ref()?;
        u64::try_from(units(resources.limits.as_ref()?.get("memory")?)?).ok()
    };
    let limits = spec.containers.iter().map(|c| limit(&c.name));
    limits.sum::<Option<u64>>().filter(|b| *b > 0)
}

/// The Pod's fsGroup.
pub(super) fn fs_group(pod: &Pod) -> Option<u32> {
    let context = pod.spec.as_ref()?.security_context.as_ref()?;
    u32::try_from(context.fs_group?).ok()
}

/// Gives a directory tree to a group that may write it. Done only when the root does not show it
/// yet: what containers changed below is theirs. Never follows a link.
fn own_by_group(dir: &Path, group: u32) -> io::Result<()> {
    let meta = dir.symlink_metadata()?;
    if meta.gid() == group && meta.mode() & 0o2070 == 0o2070 {
        return Ok(());
    }
    let mut todo = vec![dir.to_path_buf()];
    let mut found = Vec::new();
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    // The root last: it is the mark that all is done.
    for path in found
        .iter()
        .rev()
        .map(std::path::PathBuf::as_path)
        .chain([dir])
    {
        let meta = path.symlink_metadata()?;
        lchown(path, None, Some(group))?;
        if !meta.is_symlink() {
            let more = if meta.is_dir() { 0o2770 } else { 0o660 };
            fs::set_permissions(
                path,
                fs::Permissions::from_mode(meta.mode() & 0o7777 | more),
            )?;
        }
    }
    Ok(())
}

/// Checks, and where asked makes, what a hostPath names.
pub(super) fn host_path(source: &HostPathVolumeSource) -> Result<(), String> {
    let path = Path::new(&source.path);
    if !path.is_absolute() || path.components().any(|c| c.as_os_str() == "..") {
        return Err(format!(
            "hostPath {:?} must be absolute and without \"..\"",
            source.path
        ));
    }
    let kind = source.type_.as_deref().unwrap_or_default();
    if kind.is_empty() {
        return Ok(());
    }
    let failed = |why: &str| format!("hostPath type check failed: {} {why}", source.path);
    let make = |result: io::Result<()>| result.map_err(|e| failed(&format!("cannot be made: {e}")));
    let found = match fs::metadata(path) {
        Ok(meta) => Some(meta.file_type()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(failed(&format!("cannot be looked at: {e}"))),
    };
    let is = |fits: fn(&fs::FileType) -> bool, what: &str| match &found {
        Some(t) if fits(t) => Ok(()),
        Some(_) | None => Err(failed(&format!("is not {what}"))),
    };
    match (kind, &found) {
        ("DirectoryOrCreate", None) => make(make_dir(path)),
        ("FileOrCreate", None) => make(make_file(path)),
        ("DirectoryOrCreate" | "Directory", _) => is(fs::FileType::is_dir, "a directory"),
        ("FileOrCreate" | "File", _) => is(fs::FileType::is_file, "a file"),
        ("Socket", _) => is(fs::FileType::is_socket, "a socket file"),
        ("CharDevice", _) => is(fs::FileType::is_char_device, "a character device"),
        ("BlockDevice", _) => is(fs::FileType::is_block_device, "a block device"),
        (other, _) => Err(failed(&format!("has the unknown type {other:?}"))),
    }
}

fn make_dir(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

fn make_file(path: &Path) -> io::Result<()> {
    drop(fs::File::create_new(path)?);
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::{environment, pod};
    use serde_json::json;

    #[test]
    fn host_path_types_are_checked_and_made() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir(at("d")).unwrap();
        fs::write(at("f"), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("s")).unwrap();
        for (path, kind, problem) in [
            (at("none"), "", None),
            (at("d"), "Directory", None),
            (at("f"), "Directory", Some("is not a directory")),
            (at("none"), "Directory", Some("is not a directory")),
            (at("f"), "File", None),
            (at("d"), "File", Some("is not a file")),
            (at("s"), "Socket", None),
            (at("f"), "Socket", Some("is not a socket file")),
            ("/dev/null".into(), "CharDevice", None),
            (
                "/dev/null".into(),
                "BlockDevice",
                Some("is not a block device"),
            ),
            (at("new/dir"), "DirectoryOrCreate", None),
            (at("d"), "DirectoryOrCreate", None),
            (at("f"), "DirectoryOrCreate", Some("is not a directory")),
            (at("newfile"), "FileOrCreate", None),
            (at("no/parent"), "FileOrCreate", Some("cannot be made")),
            (at("f"), "Pipe", Some("unknown type")),
            ("relative".into(), "", Some("must be absolute")),
            ("/a/../b".into(), "", Some("must be absolute")),
        ] {
            let source = HostPathVolumeSource {
                path: path.clone(),
                type_: Some(kind.into()),
            };
            let got = host_path(&source).err();
            match problem {
                None => assert_eq!(got, None, "{path} {kind}"),
                Some(p) => assert!(got.unwrap().contains(p), "{path} {kind}"),
            }
        }
        let mode = |p: String| fs::metadata(p).unwrap().mode() & 0o777;
        assert_eq!((mode(at("new/dir")), mode(at("newfile"))), (0o755, 0o644));
    }

    #[test]
    fn memory_is_bounded_by_the_least_limit() {
        let limited = |memory: &str| {
            pod(json!({"spec": {"containers": [
                {"name": "a", "resources": {"limits": {"memory": memory}}}]}}))
        };
        let bare = pod(json!({"spec": {"containers": [{"name": "a"}]}}));
        for (limit, pod, size) in [
            (None, &bare, 4_000_000_000),
            (Some("1Mi"), &bare, 1 << 20),
            (Some("1Gi"), &limited("2Mi"), 2 << 20),
            (Some("100G"), &limited("200G"), 4_000_000_000),
        ] {
            let source = EmptyDirVolumeSource {
                medium: Some("Memory".into()),
                size_limit: limit
                    .map(|l| k8s_openapi::apimachinery::pkg::api::resource::Quantity(l.into())),
            };
            assert_eq!(memory_size(&source, pod, &environment()), size, "{limit:?}");
        }
    }
}
