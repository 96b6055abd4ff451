//! What a Pod's containers wait for, in the words of their status and of Events.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use super::Worker;
use super::reading::go_duration;
use crate::cri::convert;
use crate::pods::plan::{Now, Plan, Step, Waiting};
use crate::pods::seen::{Observed, Run};
use crate::store::events::{EventType, PodEvent};

impl Worker {
    /// Why containers wait: what failed, or the pause after a crash.
    pub(super) fn waiting(
        &mut self,
        pod: &Pod,
        plan: &Plan,
        now: Now,
    ) -> BTreeMap<String, Waiting> {
        self.back_off_pulls(now);
        let mut all = self.memory.trouble.clone();
        for (container, target) in &plan.untargeted {
            all.entry(container.clone()).or_insert_with(|| Waiting {
                reason: "ContainerCreating".into(),
                message: format!(
                    "waits for container {target}, whose processes it is to share, to run"
                ),
            });
        }
        for (container, delay) in &plan.crash_looping {
            all.insert(container.clone(), crash_looping(pod, container, *delay));
        }
        all
    }

    /// A pull that failed a moment ago is an error; one that waits for its next try backs off.
    fn back_off_pulls(&mut self, now: Now) {
        for (step, retry) in &self.memory.retries {
            let Step::Image { container } = step else {
                continue;
            };
            let Some(trouble) = self.memory.trouble.get_mut(container) else {
                continue;
            };
            let since = retry.not_before.saturating_sub(retry.delay);
            let rested = now.mono >= since + Duration::from_secs(1);
            if trouble.reason == "ErrImagePull" && rested && now.mono < retry.not_before {
                let message = format!("Back-off pulling image: {}", trouble.message);
                *trouble = Waiting {
                    reason: "ImagePullBackOff".into(),
                    message: message.clone(),
                };
                let event = PodEvent::new(
                    &self.key,
                    Some(container),
                    EventType::Normal,
                    "BackOff",
                    message,
                );
                self.shared.events.emit(event);
            }
        }
    }

    /// Tells of a new wait by an Event, and remembers it until the container runs: while it is being
    /// started again nothing is new.
    pub(super) fn tell_crashes(&mut self, pod: &Pod, plan: &Plan, observed: &Observed) {
        for (name, delay) in &plan.crash_looping {
            let waiting = crash_looping(pod, name, *delay);
            let before = self.memory.trouble.insert(name.clone(), waiting);
            if before.is_none_or(|w| w.reason != CRASH_LOOP) {
                self.emit(
                    Some(name),
                    EventType::Warning,
                    "BackOff",
                    &format!(
                        "Back-off restarting failed container {name} in pod {}",
                        self.key.name
                    ),
                );
            }
        }
        let runs = |name: &str| observed.newest(name).is_some_and(|c| c.run == Run::Running);
        self.memory
            .trouble
            .retain(|name, w| w.reason != CRASH_LOOP || !runs(name));
    }
}

const CRASH_LOOP: &str = "CrashLoopBackOff";

fn crash_looping(pod: &Pod, container: &str, delay: Duration) -> Waiting {
    let (namespace, name, uid) = convert::identity(pod);
    let message = format!(
        "back-off {} restarting failed container={container} pod={name}_{namespace}({uid})",
        go_duration(delay)
    );
    Waiting {
        reason: CRASH_LOOP.into(),
        message,
    }
}
