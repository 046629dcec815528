//! How services reach each other.

use std::time::{Duration, Instant};

use blixard::error::{Error, invalid};
use tonic::{
    Request,
    transport::{Channel, Endpoint},
};

use crate::admission::Deadline;

/// A connection that is not made within this time counts as failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A ping on an idle connection; a peer that vanished without a word is noticed within this and [`KEEPALIVE_TIMEOUT`].
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
/// How long a ping may stay unanswered.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Flow-control window of a stream: two log chunks in flight and a spare; with 64 KiB (HTTP/2's default) a stream of
/// log chunks waits for the reader after each one.
pub(crate) const STREAM_WINDOW: u32 = 1024 * 1024;
/// Flow-control window of a connection: a few busy streams.
pub(crate) const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// A channel that connects when it is first used, and again after each loss.
///
/// # Errors
/// INVALID_FIELD when `endpoint` is no `http://host:port`.
pub fn channel(endpoint: &str) -> Result<Channel, Error> {
    Ok(tune(parse(endpoint)?).connect_lazy())
}

/// Parses `http://host:port`.
fn parse(endpoint: &str) -> Result<Endpoint, Error> {
    let parsed = Endpoint::from_shared(endpoint.to_owned()).ok();
    parsed
        .filter(|parsed| parsed.uri().scheme_str() == Some("http") && parsed.uri().host().is_some())
        .ok_or_else(|| invalid("endpoint", endpoint, "http://host:port"))
}

/// The settings of every connection of ours, also of those over other sockets.
#[must_use]
pub fn tune(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .tcp_nodelay(true)
}

/// A request to a peer with a deadline of its own.
pub fn request<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

/// A request to a peer on behalf of a caller: it has what is left of the caller's deadline.
pub fn forward<T, U>(caller: &Request<T>, message: U) -> Request<U> {
    let mut request = Request::new(message);
    if let Some(Deadline(deadline)) = caller.extensions().get::<Deadline>() {
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    }
    request
}
