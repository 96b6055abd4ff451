//! postStart and preStop hooks: run once, against a container that runs.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cri::Cri;
use crate::stream::leftover;

/// A response's head is enough; a server that sends less than its status line in this many bytes
/// is none.
const MOST_READ: usize = 10 << 10;

/// Where a hook acts.
pub struct Place<'a> {
    pub cri: &'a dyn Cri,
    pub container: &'a Container,
    pub id: &'a str,
    pub pod_ip: Option<IpAddr>,
}

/// Runs the hook for at most `limit`; an error is a sentence for an Event.
pub async fn run(
    place: &Place<'_>,
    handler: &LifecycleHandler,
    limit: Duration,
) -> Result<(), String> {
    let work = async {
        if let Some(exec) = &handler.exec {
            let command = exec.command.clone().unwrap_or_default();
            return run_exec(place, command, limit).await;
        }
        if let Some(get) = &handler.http_get {
            return http_get(place, get).await;
        }
        if let Some(sleep) = &handler.sleep {
            let seconds = u64::try_from(sleep.seconds).unwrap_or(0);
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
        // tcpSocket is accepted by the API and means nothing.
        Ok(())
    };
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(format!("the hook did not end within {} s", limit.as_secs())),
    }
}

async fn run_exec(place: &Place<'_>, command: Vec<String>, limit: Duration) -> Result<(), String> {
    let shown = format!("{command:?}");
    // Else an exec whose asker leaves meanwhile could be taken for this one.
    let _claim = leftover::ours(place.id, &command);
    let answer = place.cri.exec_sync(place.id, command, limit).await;
    match answer {
        Ok(answer) if answer.exit_code == 0 => Ok(()),
        Ok(answer) => {
            let said = if answer.stderr.is_empty() {
                &answer.stdout
            } else {
                &answer.stderr
            };
            let cut = said.get(..said.len().min(1024)).unwrap_or_default();
            let said = String::from_utf8_lossy(cut);
            Err(format!(
                "command {shown} exited with {}: {}",
                answer.exit_code,
                said.trim()
            ))
        }
        Err(e) => Err(format!("command {shown}: {}", e.message)),
    }
}

fn port(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(n) => u16::try_from(*n).ok(),
        // An empty name has always meant 80.
        IntOrString::String(name) if name.is_empty() => Some(80),
        IntOrString::String(name) => name.parse().ok().or_else(|| {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|p| p.name.as_deref() == Some(name))?;
            u16::try_from(named.container_port).ok()
        }),
    };
    number
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("container {:?} has no port {port:?}", container.name))
}

async fn http_get(place: &Place<'_>, get: &HTTPGetAction) -> Result<(), String> {
    let port = port(place.container, &get.port)?;
    let pod = place.pod_ip.map(|ip| ip.to_string());
    let host = get.host.clone().filter(|h| !h.is_empty()).or(pod);
    let host = host.ok_or("the Pod has no address yet")?;
    let path = get.path.as_deref().unwrap_or("/");
    let head = request_head(&host, port, path, get)?;
    let failed = |what: &str, e: std::io::Error| format!("{what} {host}:{port}{path}: {e}");
    let mut stream = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(|e| failed("cannot connect to", e))?;
    stream
        .write_all(head.as_bytes())
        .await
        .map_err(|e| failed("cannot write to", e))?;
    let mut answer = Vec::new();
    while answer.len() < MOST_READ && !answer.contains(&b'\n') {
        match stream.read_buf(&mut answer).await {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) => return Err(failed("cannot read from", e)),
        }
    }
    match status_code(&answer) {
        Some(code) if (200..400).contains(&code) => Ok(()),
        Some(code) => Err(format!("{host}:{port}{path} answered {code}")),
        None => Err(format!("{host}:{port}{path} did not answer in HTTP")),
    }
}

fn request_head(host: &str, port: u16, path: &str, get: &HTTPGetAction) -> Result<String, String> {
    let bare = |text: &str| !text.bytes().any(|b| b.is_ascii_control());
    let slash = if path.starts_with('/') { "" } else { "/" };
    let mut own_host = None;
    let mut headers = String::new();
    for header in get.http_headers.iter().flatten() {
        if !bare(&header.name) || !bare(&header.value) {
            return Err(format!(
                "header {:?} has a control character in it",
                header.name
            ));
        }
        if header.name.eq_ignore_ascii_case("host") {
            own_host = Some(header.value.clone());
        } else {
            headers.push_str(&format!("{}: {}\r\n", header.name, header.value));
        }
    }
    if !bare(path) || path.contains(' ') {
        return Err(format!("path {path:?} cannot be asked for"));
    }
    let host = own_host.unwrap_or_else(|| format!("{host}:{port}"));
    Ok(format!(
        "GET {slash}{path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-lifecycle/edge\r\n\
         Accept: */*\r\nConnection: close\r\n{headers}\r\n"
    ))
}

fn status_code(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|b| *b == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    words.next().filter(|w| w.starts_with("HTTP/1."))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::fake::Fake;
    use k8s_openapi::api::core::v1::{ContainerPort, ExecAction, HTTPHeader};

    #[tokio::test(start_paused = true)]
    async fn while_a_hook_runs_its_process_is_claimed() {
        let runtime = Fake::new(jiff::Timestamp::UNIX_EPOCH);
        runtime.delay("ExecSync", Duration::from_secs(5));
        let place = Place {
            cri: &runtime,
            container: &Container::default(),
            id: "of-a-hook",
            pod_ip: None,
        };
        let handler = LifecycleHandler {
            exec: Some(ExecAction {
                command: Some(vec!["hook.sh".into()]),
            }),
            ..Default::default()
        };
        for limit in [2, 10] {
            let look = async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                leftover::count_ours(place.id)
            };
            let ran = run(&place, &handler, Duration::from_secs(limit));
            assert_eq!(tokio::join!(ran, look).1, 1);
            assert_eq!(leftover::count_ours(place.id), 0, "{limit} s");
        }
    }

    #[test]
    fn ports_are_found_by_number_and_by_name() {
        let container = Container {
            ports: Some(vec![ContainerPort {
                name: Some("web".into()),
                container_port: 8080,
                ..Default::default()
            }]),
            ..Default::default()
        };
        for (asked, found) in [
            (IntOrString::Int(81), Some(81)),
            (IntOrString::Int(0), None),
            (IntOrString::Int(70_000), None),
            (IntOrString::String("web".into()), Some(8080)),
            (IntOrString::String("82".into()), Some(82)),
            (IntOrString::String(String::new()), Some(80)),
            (IntOrString::String("none".into()), None),
        ] {
            assert_eq!(port(&container, &asked).ok(), found, "{asked:?}");
        }
    }

    #[test]
    fn a_header_cannot_smuggle_another_request() {
        let get = |value: &str| HTTPGetAction {
            http_headers: Some(vec![HTTPHeader {
                name: "X-A".into(),
                value: value.into(),
            }]),
            ..Default::default()
        };
        assert!(request_head("h", 1, "/", &get("a\r\nB: c")).is_err());
        assert!(request_head("h", 1, "/a b", &get("a")).is_err());
        let head = request_head("h", 1, "x", &get("a")).unwrap();
        assert!(
            head.starts_with("GET /x HTTP/1.1\r\nHost: h:1\r\n") && head.contains("X-A: a\r\n")
        );
    }

    #[test]
    fn only_an_http_answer_has_a_status() {
        assert_eq!(status_code(b"HTTP/1.1 204 No Content\r\n"), Some(204));
        assert_eq!(status_code(b"SSH-2.0-x\r\n"), None);
        assert_eq!(status_code(b""), None);
    }
}
