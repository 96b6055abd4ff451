//! What a Pod's containers wait for, in the words of their status and of Events.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use super::Worker;
use super::reading::go_duration;
use crate::cri::convert;
use crate::pods::plan::{Now, Plan, Step, Waiting};
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
        let (namespace, name, uid) = convert::identity(pod);
        for (container, delay) in &plan.crash_looping {
            let message = format!(
                "back-off {} restarting failed container={container} pod={name}_{namespace}({uid})",
                go_duration(*delay)
            );
            all.insert(
                container.clone(),
                Waiting {
                    reason: "CrashLoopBackOff".into(),
                    message,
                },
            );
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

    pub(super) fn tell_crashes(&mut self, plan: &Plan) {
        for name in plan.crash_looping.keys() {
            let known = self
                .memory
                .trouble
                .get(name)
                .is_some_and(|w| w.reason == "CrashLoopBackOff");
            if !known {
                self.emit(
                    Some(name),
                    EventType::Warning,
                    "BackOff",
                    &format!(
                        "Back-off restarting failed container {name} in pod {}",
                        self.key.name
                    ),
                );
                let waiting = Waiting {
                    reason: "CrashLoopBackOff".into(),
                    message: String::new(),
                };
                self.memory.trouble.insert(name.clone(), waiting);
            }
        }
        self.memory.trouble.retain(|name, w| {
            w.reason != "CrashLoopBackOff" || plan.crash_looping.contains_key(name)
        });
    }
}
