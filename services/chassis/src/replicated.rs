//! A channel to a service that runs as several replicas, of which any takes every call.
//!
//! It stays with one replica until that one does not answer or refuses as UNAVAILABLE; then the next call goes to the next.
//! It repeats nothing itself: only the caller knows what may be repeated. Each call tells the highest revision that was
//! seen in an answer, so that no replica shows an older state than another has shown before.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use blixard::{
    error::Error,
    replica::{MIN_REVISION, REVISION},
};
use http::{HeaderMap, HeaderValue, Request, Response};
use tonic::{Code, body::Body, transport::Channel};
use tower::Service;

use crate::client;

/// See the module. Clones share the choice of the replica and the revision.
#[derive(Debug, Clone)]
pub struct ReplicatedChannel {
    channels: Arc<[Channel]>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Counts the changes of replica.
    turn: AtomicUsize,
    /// The highest revision seen.
    seen: AtomicU64,
}

impl ReplicatedChannel {
    /// Connects when it is first used, and again after each loss.
    ///
    /// # Errors
    /// INVALID_FIELD when `endpoints` is not `http://host:port`, or several of them with commas between.
    pub fn new(endpoints: &str) -> Result<Self, Error> {
        let channels = endpoints.split(',').map(|endpoint| client::channel(endpoint.trim()));
        Ok(Self { channels: channels.collect::<Result<_, _>>()?, shared: Arc::default() })
    }

    /// What comes after must show this revision: for those who learn of it from a stream.
    pub fn saw(&self, revision: u64) {
        self.shared.seen.fetch_max(revision, Ordering::Relaxed);
    }
}

impl Service<Request<Body>> for ReplicatedChannel {
    type Response = Response<Body>;
    type Error = tonic::transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        let turn = Turn { number: shared.turn.load(Ordering::Relaxed), shared, over: true };
        let mut channel = self.channels[turn.number % self.channels.len()].clone();
        let seen = turn.shared.seen.load(Ordering::Relaxed);
        if seen > 0 {
            request.headers_mut().insert(MIN_REVISION, HeaderValue::from(seen));
        }
        Box::pin(async move {
            std::future::poll_fn(|context| channel.poll_ready(context)).await?;
            let response = channel.call(request).await?;
            turn.answered(response.headers());
            Ok(response)
        })
    }
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// A call to one replica. If that does not answer, or nobody waits for it any longer, it is the next one's turn; of many
/// such calls the first one counts.
struct Turn {
    number: usize,
    shared: Arc<Shared>,
    over: bool,
}

impl Turn {
    fn answered(mut self, headers: &HeaderMap) {
        if let Some(revision) = number(headers, REVISION) {
            self.shared.seen.fetch_max(revision, Ordering::Relaxed);
        }
        self.over = number(headers, "grpc-status") == Some(Code::Unavailable as u64);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.over {
            let next = self.number.wrapping_add(1);
            let _ = self.shared.turn.compare_exchange(self.number, next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}
