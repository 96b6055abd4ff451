//! Two connections joined: what one end says, the other hears, until either has ended.
//!
//! ```text
//! asker ── there ──► answerer      the answerer's end is the end of both
//!       ◄─ back ───                the asker's end leaves the answerer GRACE to end as well
//! ```
//!
//! An exec, attach or port-forward ends when the runtime has said all. When the asker is gone there
//! is nobody to say it to: without the grace's end a process that never writes would never be left.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

/// "Closing at either end ends the other within a second", both hops included.
const GRACE: Duration = Duration::from_millis(300);

/// How a splice ended.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Bytes from the asker to the answerer.
    pub there: u64,
    /// Bytes from the answerer to the asker.
    pub back: u64,
    /// The asker ended first. Runtimes close their end at that, whatever became of what was asked
    /// for: the answerer's end then says nothing of a process.
    pub asker_first: bool,
    /// The asker left, and the answerer did not end within the grace either.
    pub left: bool,
    /// What broke, where something did.
    pub error: Option<io::Error>,
}

/// Copies both ways until the end; both connections are closed then.
pub async fn splice<A, B>(asker: A, answerer: B) -> Outcome
where
    A: AsyncRead + AsyncWrite + Send,
    B: AsyncRead + AsyncWrite + Send,
{
    let (mut from_asker, mut to_asker) = tokio::io::split(asker);
    let (mut from_answerer, mut to_answerer) = tokio::io::split(answerer);
    let mut outcome = Outcome::default();
    let mut asker_first = false;
    let ended = {
        let mut there = std::pin::pin!(copy(&mut from_asker, &mut to_answerer, &mut outcome.there));
        let mut back = std::pin::pin!(copy(&mut from_answerer, &mut to_asker, &mut outcome.back));
        tokio::select! {
            biased;
            end = &mut back => end.map(|()| false),
            _ = &mut there => {
                asker_first = true;
                match tokio::time::timeout(GRACE, &mut back).await {
                    Ok(end) => end.map(|()| false),
                    Err(_) => Ok(true),
                }
            }
        }
    };
    outcome.asker_first = asker_first;
    match ended {
        Ok(left) => outcome.left = left,
        Err(error) => outcome.error = Some(error),
    }
    // Those that are closed already say so; there is nothing to do about it.
    let _ = tokio::time::timeout(GRACE, to_asker.shutdown()).await;
    let _ = tokio::time::timeout(GRACE, to_answerer.shutdown()).await;
    outcome
}

/// One direction, to its end; the writer is shut down at the reader's end.
async fn copy<A, B>(
    from: &mut ReadHalf<A>,
    to: &mut WriteHalf<B>,
    count: &mut u64,
) -> io::Result<()>
where
    A: AsyncRead,
    B: AsyncWrite,
{
    let mut buffer = vec![0; super::BUFFER];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
        to.flush().await?;
        *count += length as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    #[tokio::test(start_paused = true)]
    async fn the_answerers_end_is_the_end_and_nothing_of_it_is_lost() {
        let (mut client, asker) = duplex(64 * 1024);
        let (mut server, answerer) = duplex(64 * 1024);
        let spliced = tokio::spawn(splice(asker, answerer));
        client.write_all(b"question").await.unwrap();
        let mut asked = [0; 8];
        server.read_exact(&mut asked).await.unwrap();
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        let outcome = spliced.await.unwrap();
        assert_eq!((outcome.there, outcome.back), (8, 6));
        assert!(!outcome.left && !outcome.asker_first);
    }

    #[tokio::test(start_paused = true)]
    async fn an_asker_that_left_ends_an_answerer_that_does_not_listen() {
        let (client, asker) = duplex(64);
        let (server, answerer) = duplex(64);
        let begun = tokio::time::Instant::now();
        drop(client);
        let outcome = splice(asker, answerer).await;
        assert!(outcome.left);
        assert!(begun.elapsed() < Duration::from_secs(1));
        drop(server);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answerer_that_ends_after_its_asker_still_counts_as_ended() {
        let (client, asker) = duplex(64);
        let (mut server, answerer) = duplex(64);
        let spliced = tokio::spawn(splice(asker, answerer));
        drop(client);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        drop(server);
        let outcome = spliced.await.unwrap();
        assert!(!outcome.left && outcome.asker_first);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_stops_the_sender() {
        let (client, asker) = duplex(16);
        let (mut server, answerer) = duplex(16);
        let spliced = tokio::spawn(splice(asker, answerer));
        let more = vec![7; 4 * super::super::BUFFER];
        let wrote = tokio::time::timeout(Duration::from_secs(60), server.write_all(&more)).await;
        assert!(wrote.is_err(), "all of it was taken though nobody reads");
        drop((client, server));
        spliced.await.unwrap();
    }
}
