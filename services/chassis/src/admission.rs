//! The layer that every request passes: a span, a limit on concurrency, a deadline, and an end at shutdown.
//!
//! tonic's own deadline answers CANCELLED (seen in 0.14.9); a caller is owed DEADLINE_EXCEEDED. A deadline that the caller
//! set covers the whole call, streams too; the default one covers the time until a call answers, so a unary call
//! always ends and a stream may live. At shutdown open streams end with SHUTTING_DOWN, which clients take as "connect again".

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason},
    limits,
};
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use tokio::{
    sync::Semaphore,
    time::{Sleep, sleep_until},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};
use tracing::Instrument as _;

use crate::metrics::Call;

/// Ours fires this much (or a tenth of the timeout) before the caller's, so that the answer that names the reason arrives
/// before the caller's own timer, and tonic's, cut the call.
const MARGIN: Duration = Duration::from_millis(25);

/// When a call must be answered; in the extensions of every request.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub Instant);

/// Makes [`Admission`].
#[derive(Clone)]
pub(crate) struct AdmissionLayer {
    slots: Arc<Semaphore>,
    token: CancellationToken,
}

impl AdmissionLayer {
    pub(crate) fn new(token: CancellationToken) -> Self {
        Self { slots: Arc::new(Semaphore::new(limits::MAX_CONCURRENT_REQUESTS)), token }
    }
}

impl<S> Layer<S> for AdmissionLayer {
    type Service = Admission<S>;

    fn layer(&self, inner: S) -> Admission<S> {
        Admission { inner, shared: self.clone() }
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Admission<S> {
    inner: S,
    shared: AdmissionLayer,
}

impl<S> Service<Request<Body>> for Admission<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let mut call = Call::begin(&request);
        let mut refuse = |status: Status| -> Self::Future {
            let response = status.into_http();
            call.look(response.headers());
            Box::pin(std::future::ready(Ok(response)))
        };
        let Ok(slot) = self.shared.slots.clone().try_acquire_owned() else { return refuse(overloaded()) };
        let asked = request.headers().get("grpc-timeout").map(parse_timeout);
        let timeout = match asked {
            None => limits::DEFAULT_DEADLINE,
            Some(Some(timeout)) => timeout.saturating_sub(MARGIN.min(timeout / 10)),
            Some(None) => return refuse(malformed_timeout()),
        };
        let deadline = Instant::now() + timeout;
        request.extensions_mut().insert(Deadline(deadline));

        let span = tracing::debug_span!("rpc", method = request.uri().path());
        let token = self.shared.token.clone();
        let answer = self.inner.call(request);
        Box::pin(
            async move {
                let result = tokio::time::timeout_at(deadline.into(), answer).await;
                drop(slot);
                let Ok(answered) = result else {
                    let response = deadline_exceeded().into_http();
                    call.look(response.headers());
                    return Ok(response);
                };
                let response = name_the_limit(answered?);
                call.look(response.headers());
                Ok(response.map(|body| Body::new(Bounded::new(body, asked.map(|_| deadline), token, call))))
            }
            .instrument(span),
        )
    }
}

/// A response body that ends at the caller's deadline and at shutdown, with a status that says so.
struct Bounded {
    inner: Body,
    deadline: Option<Pin<Box<Sleep>>>,
    shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
    call: Call,
    ended: bool,
}

impl Bounded {
    fn new(inner: Body, deadline: Option<Instant>, token: CancellationToken, call: Call) -> Self {
        Self {
            inner,
            deadline: deadline.map(|deadline| Box::pin(sleep_until(deadline.into()))),
            shutdown: Box::pin(token.cancelled_owned()),
            call,
            ended: false,
        }
    }

    fn cut_short(&mut self, context: &mut Context<'_>) -> Option<Status> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            return Some(deadline_exceeded());
        }
        self.shutdown.as_mut().poll(context).is_ready().then(shutting_down)
    }
}

impl http_body::Body for Bounded {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(context) {
            if let Some(Ok(frame)) = &frame
                && let Some(trailers) = frame.trailers_ref()
            {
                self.call.look(trailers);
            }
            return Poll::Ready(frame);
        }
        let Some(status) = self.cut_short(context) else { return Poll::Pending };
        self.ended = true;
        let mut trailers = HeaderMap::new();
        let added = status.add_header(&mut trailers);
        self.call.look(&trailers);
        match added {
            Ok(()) => Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
            Err(status) => Poll::Ready(Some(Err(status))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// `grpc-timeout`: at most eight digits and a unit (the gRPC protocol's "Timeout").
fn parse_timeout(value: &http::HeaderValue) -> Option<Duration> {
    let value = value.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// tonic refuses a message that is too large as OUT_OF_RANGE without a reason (seen in 0.14.9); a caller is owed one.
fn name_the_limit(response: Response<Body>) -> Response<Body> {
    let refused = Status::from_header_map(response.headers()).filter(|status| status.code() == Code::OutOfRange);
    let Some(found) = refused.as_ref().and_then(|status| status.message().strip_prefix(TOO_LARGE)) else {
        return response;
    };
    let size = found.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    let allowed = format!("at most {} bytes", limits::MAX_MESSAGE_BYTES);
    Status::from(blixard::error::invalid("message", size, &allowed)).into_http()
}

/// How tonic's message about it begins.
const TOO_LARGE: &str = "Error, decoded message length too large: found ";

fn malformed_timeout() -> Status {
    blixard::error::invalid("grpc-timeout", "", "at most eight digits and one of H, M, S, m, u, n").into()
}

fn deadline_exceeded() -> Status {
    Error::new(Reason::DeadlineExceeded, "the deadline passed before the answer was ready; the outcome is unknown")
        .into()
}

fn overloaded() -> Status {
    let limit = limits::MAX_CONCURRENT_REQUESTS;
    Error::new(Reason::Overloaded, format!("{limit} requests are being worked on already")).with("limit", limit).into()
}

fn shutting_down() -> Status {
    Error::new(Reason::ShuttingDown, "the server is shutting down").into()
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt as _;

    use super::*;

    /// What a server answers to a call that its handler never does.
    async fn answer_to_silence(timeout: &'static str, token: CancellationToken) -> Status {
        let silent = tower::service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, Status>>());
        let request = Request::builder().uri("/p.S/M").header("grpc-timeout", timeout).body(Body::empty());
        let answer = AdmissionLayer::new(token).layer(silent).oneshot(request.expect("a request")).await;
        Status::from_header_map(answer.expect("an answer").headers()).expect("a status")
    }

    #[tokio::test(start_paused = true)]
    async fn a_missed_deadline_is_answered_as_deadline_exceeded_before_the_callers_own_timer() {
        let began = tokio::time::Instant::now();
        let status = answer_to_silence("500m", CancellationToken::new()).await;
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status:?}");
        assert_eq!(Error::from_status(&status).reason, Reason::DeadlineExceeded);
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_malformed_timeout_is_refused() {
        let status = answer_to_silence("soon", CancellationToken::new()).await;
        assert_eq!(Error::from_status(&status).reason, Reason::InvalidField, "{status:?}");
    }

    #[test]
    fn timeouts_parse_as_the_grpc_protocol_says() {
        let parse = |text: &'static str| parse_timeout(&http::HeaderValue::from_static(text));
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse("99999999S"), Some(Duration::from_secs(99_999_999)));
        for bad in ["", "S", "5", "5x", "123456789S", "-5S", "1é"] {
            assert_eq!(http::HeaderValue::from_str(bad).ok().and_then(|value| parse_timeout(&value)), None, "{bad}");
        }
    }
}
