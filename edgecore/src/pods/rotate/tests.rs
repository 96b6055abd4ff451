use std::io::Read as _;

use flate2::read::GzDecoder;

use super::*;
use crate::cri::fake::Fake;
use crate::cri::{Failure, api};

const UID: &str = "u-1";

/// One container that runs and logs.
struct Rig {
    fake: Fake,
    dir: tempfile::TempDir,
    rotation: Rotation,
    second: i64,
}

const CONFIG: Config = Config {
    most_bytes: 10,
    most_files: 4,
};

impl Rig {
    async fn new() -> Self {
        let fake = Fake::new(Timestamp::UNIX_EPOCH);
        let labels = [(convert::POD_UID, UID), (convert::CONTAINER_NAME, "main")];
        let labels: std::collections::HashMap<_, _> = labels
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into_iter()
            .collect();
        let sandbox = fake.run_sandbox(Default::default(), String::new()).await;
        let request = api::CreateContainerRequest {
            pod_sandbox_id: sandbox.unwrap(),
            config: Some(api::ContainerConfig {
                metadata: Some(api::ContainerMetadata {
                    name: "main".into(),
                    attempt: 1,
                }),
                labels,
                ..Default::default()
            }),
            ..Default::default()
        };
        let id = fake.create_container(request).await.unwrap();
        fake.start_container(&id).await.unwrap();
        fake.forget_calls();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("main")).unwrap();
        Self {
            fake,
            dir,
            rotation: Rotation::default(),
            second: 1_800_000_000,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("main").join(name)
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("main")).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    fn due(&self) -> Vec<Due> {
        due_in(self.dir.path(), UID, CONFIG.most_bytes)
    }

    /// Writes a log that is too large and serves it.
    async fn rotate(&mut self, text: &str) -> Result<(), Error> {
        fs::write(self.path("1.log"), text).unwrap();
        let due = self.due();
        assert_eq!(due.len(), 1, "{due:?}");
        self.second += 10;
        let now = Timestamp::from_second(self.second).unwrap();
        self.rotation.serve(&self.fake, &due[0], CONFIG, now).await
    }
}

fn unpacked(path: &Path) -> String {
    let mut text = String::new();
    let mut decoder = GzDecoder::new(File::open(path).unwrap());
    decoder.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn old_logs_are_compressed_and_only_so_many_are_kept() {
    let mut rig = Rig::new().await;
    for round in 0..6 {
        rig.rotate(&format!("the log of round {round}"))
            .await
            .unwrap();
    }
    let want = [
        "1.log.20270115-080040.gz",
        "1.log.20270115-080050.gz",
        "1.log.20270115-080100",
    ];
    assert_eq!(rig.files(), want, "and the runtime makes the current one");
    assert_eq!(unpacked(&rig.path(want[0])), "the log of round 3");
    let newest = fs::read_to_string(rig.path(want[2])).unwrap();
    assert_eq!(newest, "the log of round 5");
    assert_eq!(rig.fake.calls(), ["ReopenContainerLog main/1"; 6]);
}

#[tokio::test]
async fn small_logs_and_those_of_the_dead_are_left_alone() {
    let mut rig = Rig::new().await;
    fs::write(rig.path("1.log"), "small").unwrap();
    // The instance before it is nobody's to reopen.
    fs::write(rig.path("0.log"), "as large as it ended").unwrap();
    assert_eq!(rig.due(), []);
    let containers = rig.fake.list_containers(Some(UID)).await.unwrap();
    rig.fake
        .stop_container(&containers[0].id, Duration::ZERO)
        .await
        .unwrap();
    rig.rotate("large, but it has ended").await.unwrap();
    assert_eq!(rig.files(), ["0.log", "1.log"]);
}

#[tokio::test]
async fn a_log_that_is_not_reopened_gets_its_name_back_and_is_told_of_once() {
    let mut rig = Rig::new().await;
    for _ in 0..2 {
        rig.fake
            .fail_next("ReopenContainerLog", Failure::Refused, "no room");
        let failed = rig.rotate("a log that grows").await;
        let text = common::telemetry::chain(failed.as_ref().unwrap_err());
        assert!(text.contains("1.log") && text.contains("no room"), "{text}");
        let path = rig.path("1.log");
        rig.rotation.tell(&path, failed);
        assert_eq!(rig.files(), ["1.log"]);
        assert_eq!(rig.rotation.told.len(), 1);
    }
    let worked = rig.rotate("a log that grows").await;
    let path = rig.path("1.log");
    rig.rotation.tell(&path, worked);
    assert!(rig.rotation.told.is_empty());
}

#[tokio::test]
async fn a_new_log_that_the_runtime_made_is_never_written_over() {
    let mut rig = Rig::new().await;
    fs::write(rig.path("1.log"), "first words of the new file").unwrap();
    fs::write(rig.path("1.log.1"), "old").unwrap();
    let ids = rig.fake.list_containers(Some(UID)).await.unwrap();
    let (renamed, path) = (rig.path("1.log.1"), rig.path("1.log"));
    rig.rotation.take_back(&renamed, &path, ids[0].id.clone());
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "first words of the new file"
    );
    assert_eq!(fs::read_to_string(&renamed).unwrap(), "old");
    rig.fake
        .fail_next("ReopenContainerLog", Failure::Deadline, "late");
    rig.rotation.open_again(&rig.fake).await;
    assert_eq!(rig.rotation.unopened.len(), 1, "asked until it answers");
    rig.rotation.open_again(&rig.fake).await;
    assert_eq!(rig.rotation.unopened.len(), 0);
    assert_eq!(rig.fake.calls(), ["ReopenContainerLog main/1"]);
}

#[tokio::test]
async fn a_rotation_that_was_cut_in_half_is_finished() {
    let mut rig = Rig::new().await;
    fs::write(rig.path("1.log.20270115-080000"), "renamed").unwrap();
    let due = rig.due();
    assert_eq!(due[0].what, What::Reopen);
    let done = rig
        .rotation
        .serve(&rig.fake, &due[0], CONFIG, Timestamp::UNIX_EPOCH)
        .await;
    done.unwrap();
    assert_eq!(rig.fake.calls(), ["ReopenContainerLog main/1"]);
}

#[tokio::test]
async fn what_cannot_be_compressed_stays_and_the_log_is_rotated_all_the_same() {
    let mut rig = Rig::new().await;
    rig.rotate("the first of two").await.unwrap();
    let old = rig.files()[0].clone();
    // Nothing can be made under the name of its unfinished copy.
    fs::create_dir_all(rig.path(&format!("{old}.gz"))).unwrap();
    fs::write(rig.path(&format!("{old}.gz/x")), "").unwrap();
    let failed = rig.rotate("the second of two").await.unwrap_err();
    assert!(matches!(failed, Error::Compress(..)), "{failed}");
    assert_eq!(
        fs::read_to_string(rig.path(&old)).unwrap(),
        "the first of two"
    );
    assert!(!rig.path("1.log").exists() && rig.fake.calls().len() == 2);
}

#[test]
fn an_instance_takes_its_logs_along_unless_they_are_the_last() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["0.log", "0.log.1.gz", "1.log", "10.log"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    remove_instance(&dir.path().join("10.log"));
    remove_instance(&dir.path().join("0.log"));
    let left = |name: &str| dir.path().join(name).exists();
    assert!(left("10.log") && left("1.log"));
    assert!(!left("0.log") && !left("0.log.1.gz"));
}
