//! Metrics in Prometheus' text format, at `GET /metrics` on a listener of their own.
//!
//! ```text
//!   handle (registered once) ── atomic add ─► recorder ◄── upkeep, render ── GET /metrics
//! ```
//! One recorder per process, put in place before anything registers a metric. Where no address is set there is none, and
//! recording costs nothing. It must not know what is measured: every service describes its own.

use std::{convert::Infallible, io, net::SocketAddr, sync::OnceLock, time::Duration};

use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::{TcpListener, TcpStream};
use tonic::{Code, Status};

use crate::Tasks;

/// Calls that a server has ended, by method and by gRPC code.
const GRPC_REQUESTS: &str = "blixard_grpc_requests_total";
/// Bounds of histograms whose name ends in `_seconds`: from a lone fsync on a good disk to the longest deadline.
const SECONDS: [f64; 14] = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3, 0.125, 0.25, 0.5, 1.0, 5.0, 30.0];
/// Bounds of all other histograms, which count things.
const COUNTS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
/// How often samples are folded into their histograms: what is recorded in between is kept in memory, one by one.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// A client that has not sent a request by then is let go.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// What Prometheus' text format calls itself.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Metrics can't be served.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The address can't be had.
    #[error("cannot listen on {address} for metrics: choose another with --metrics-listen")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A process has one recorder, and it has one already.
    #[error("the recorder of metrics")]
    Recorder(#[from] BuildError),
}

/// Puts the recorder in place and serves it until the tasks are shut down; with no address, does nothing. Returns the
/// address it listens on. To be called before services start.
///
/// # Errors
/// The address can't be had, or this was called before.
pub async fn serve(address: Option<SocketAddr>, tasks: &Tasks) -> Result<Option<SocketAddr>, MetricsError> {
    let Some(address) = address else { return Ok(None) };
    let bound = TcpListener::bind(address).await.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (bound, listener) = bound.map_err(|source| MetricsError::Bind { address, source })?;
    let handle = PrometheusBuilder::new()
        .set_buckets(&COUNTS)?
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?
        .install_recorder()?;
    metrics::describe_counter!(GRPC_REQUESTS, "Calls that a server has ended, by method and gRPC code.");
    let handle = RECORDER.get_or_init(|| handle);
    tasks.spawn("metrics", accept(listener, handle, tasks.clone()));
    Ok(Some(bound))
}

async fn accept(listener: TcpListener, recorder: &'static PrometheusHandle, tasks: Tasks) {
    let mut upkeep = tokio::time::interval(UPKEEP_EVERY);
    loop {
        tokio::select! {
            () = tasks.token().cancelled() => return,
            _ = upkeep.tick() => recorder.run_upkeep(),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let stop = tasks.token().clone();
                    tasks.spawn("metrics connection", async move {
                        stop.run_until_cancelled(converse(stream, recorder)).await;
                    });
                }
                // Out of descriptors, mostly: not a reason to stop, nor to try again at once.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for metrics");
                    upkeep.tick().await;
                }
            },
        }
    }
}

async fn converse(stream: TcpStream, recorder: &'static PrometheusHandle) {
    let service = service_fn(move |request| async move { Ok::<_, Infallible>(answer(&request, recorder)) });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_DEADLINE)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection for metrics ended");
    }
}

fn answer(request: &Request<Incoming>, recorder: &PrometheusHandle) -> Response<String> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, recorder.render()),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "GET /metrics\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "metrics are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(text);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(TEXT_FORMAT));
    response
}

/// A call under way, counted when it ends. Dropped before that: its client has gone.
pub(crate) struct Call {
    method: Option<String>,
}

impl Call {
    /// Counts nothing where no metrics are served.
    pub(crate) fn begin<B>(request: &Request<B>) -> Self {
        Self { method: RECORDER.get().map(|_| request.uri().path().to_owned()) }
    }

    /// What the headers or the trailers of its answer say, if they say that it is over.
    pub(crate) fn look(&mut self, headers: &http::HeaderMap) {
        if self.method.is_some()
            && let Some(status) = Status::from_header_map(headers)
        {
            self.end(status.code());
        }
    }

    fn end(&mut self, code: Code) {
        let Some(method) = self.method.take() else { return };
        // A client may ask for any path; a metric for each would never stop growing.
        let method = if code == Code::Unimplemented { "unknown".to_owned() } else { method };
        metrics::counter!(GRPC_REQUESTS, "method" => method, "code" => format!("{code:?}")).increment(1);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}
