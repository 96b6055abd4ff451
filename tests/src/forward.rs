//! A running `kubectl port-forward` and its local ends.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::kubectl::Kubectl;
use crate::running::Running;

/// How long it may take to listen, and one read or write to go on.
const LIMIT: Duration = Duration::from_secs(30);

pub struct Forward {
    pub kubectl: Running,
    ends: Vec<SocketAddr>,
}

impl Forward {
    /// Forwards these ports of a Pod, each from a free one here.
    pub fn start(kubectl: &Kubectl, pod: &str, ports: &[u16]) -> Result<Forward> {
        let words: Vec<String> = ports.iter().map(|port| format!(":{port}")).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let fixed = ["port-forward", "--address=127.0.0.1", pod];
        let mut kubectl = kubectl.start(&[&fixed[..], &words].concat())?;
        // A line for each: "Forwarding from 127.0.0.1:40123 -> 7001".
        let mut ends = Vec::new();
        for port in ports {
            let arrow = format!("-> {port}");
            let said = kubectl.sees(&format!("{arrow}\n"), LIMIT)?;
            let line = said.lines().find(|line| line.ends_with(&arrow));
            let address = line.and_then(|line| line.split(' ').nth(2));
            ends.push(address.context("kubectl says where it listens")?.parse()?);
        }
        Ok(Forward { kubectl, ends })
    }

    /// A connection to the port that was asked for at that place.
    pub fn dial(&self, place: usize) -> Result<TcpStream> {
        let stream = TcpStream::connect(self.ends[place])?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(stream)
    }
}
