//! A gRPC server with everything every service has: health, reflection, limits, deadlines, ordered shutdown.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use blixard::{limits, pb};
use futures::future::join_all;
use http::{Request, Response};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;
use tonic::{
    body::Body,
    server::NamedService,
    service::{Routes, RoutesBuilder},
    transport::server::TcpIncoming,
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::Service;

use crate::{
    Tasks,
    admission::AdmissionLayer,
    client::{CONNECTION_WINDOW, STREAM_WINDOW},
    signals,
};

/// How long calls have to end after shutdown began.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// Pings to clients that have gone silent, so that a dead one's streams are let go.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);

/// A server that is bound and not yet serving.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    routes: RoutesBuilder,
    names: Vec<&'static str>,
    health: HealthReporter,
    serving: Option<watch::Receiver<bool>>,
    health_of: Vec<(&'static str, watch::Receiver<bool>)>,
}

/// The address can't be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}{}", if source.kind() == std::io::ErrorKind::AddrInUse { ": another process does; choose another with --listen" } else { "" })]
pub struct BindError {
    /// The address.
    pub address: SocketAddr,
    /// What the kernel said.
    #[source]
    pub source: std::io::Error,
}

/// The server ended with an error.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Our own contracts could not be served for reflection.
    #[error("reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The transport failed.
    #[error("transport")]
    Transport(#[from] tonic::transport::Error),
    /// The process can't listen for signals.
    #[error("signals")]
    Signals(#[from] std::io::Error),
}

impl Server {
    /// Binds the address; port 0 takes a free one. Clients may connect from now on and wait until `serve`.
    ///
    /// # Errors
    /// The address is in use or is not this machine's.
    pub async fn bind(address: SocketAddr) -> Result<Self, BindError> {
        let bound = TcpListener::bind(address).await.and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (address, listener) = bound.map_err(|source| BindError { address, source })?;
        let (health, health_service) = tonic_health::server::health_reporter();
        let mut routes = Routes::builder();
        routes.add_service(health_service);
        Ok(Self { listener, address, routes, names: Vec::new(), health, serving: None, health_of: Vec::new() })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The endpoint under which processes of this machine reach it.
    #[must_use]
    pub fn local_endpoint(&self) -> String {
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() {
                [127, 0, 0, 1].into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            });
        }
        format!("http://{address}")
    }

    /// Adds a service. It becomes SERVING when `serve` begins, under its full name.
    #[must_use]
    pub fn add_service<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes.add_service(service);
        self.names.push(S::NAME);
        self
    }

    /// Health says NOT_SERVING while `serving` is false, although calls are answered: for a server whose services need
    /// each other, through it, to start, or whose services can't always do their work.
    #[must_use]
    pub fn serving_while(mut self, serving: watch::Receiver<bool>) -> Self {
        self.serving = Some(serving);
        self
    }

    /// Another name in the health service, SERVING while `serving` is true.
    #[must_use]
    pub fn with_health(mut self, name: &'static str, serving: watch::Receiver<bool>) -> Self {
        self.health_of.push((name, serving));
        self
    }

    /// Serves until the process is asked to end (SIGINT, SIGTERM), then ends the tasks in order.
    ///
    /// # Errors
    /// The transport failed.
    pub async fn run(self, tasks: &Tasks) -> Result<(), ServeError> {
        let asked = async {
            signals::asked_to_end().await?;
            tasks.token().cancel();
            std::future::pending().await
        };
        let result = tokio::select! {
            result = self.serve(tasks) => result,
            result = asked => result,
        };
        tasks.shutdown(SHUTDOWN_GRACE).await;
        result
    }

    /// Serves until the tasks' token is cancelled; then says NOT_SERVING, ends open streams, stops accepting and gives
    /// the calls that are left a bounded grace.
    ///
    /// # Errors
    /// The transport failed.
    pub async fn serve(mut self, tasks: &Tasks) -> Result<(), ServeError> {
        let reflection = || {
            let builder = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // The details of our errors, so that grpcurl can show them.
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("grpc.health.v1.Health");
            // Listed is what is served here, not every contract there is.
            self.names.iter().fold(builder, |builder, name| builder.with_service_name(*name))
        };
        let (v1, v1alpha) = (reflection().build_v1()?, reflection().build_v1alpha()?);
        self.routes.add_service(v1);
        self.routes.add_service(v1alpha);
        let stop = tasks.token().clone();
        let all = self.names.iter().copied().chain([""]).collect();
        let mut healths = vec![Health { names: all, serving: self.serving, reporter: self.health.clone() }];
        healths.extend(self.health_of.into_iter().map(|(name, serving)| Health {
            names: vec![name],
            serving: Some(serving),
            reporter: self.health.clone(),
        }));
        for health in &healths {
            health.announce().await;
        }
        let until_stopped = {
            let stop = stop.clone();
            async move {
                join_all(healths.into_iter().map(|health| health.follow(&stop))).await;
            }
        };
        let serving = tonic::transport::Server::builder()
            .layer(AdmissionLayer::new(stop.clone()))
            .max_concurrent_streams(limits::MAX_STREAMS_PER_CONNECTION)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
            .add_routes(self.routes.routes())
            .serve_with_incoming_shutdown(TcpIncoming::from(self.listener).with_nodelay(Some(true)), until_stopped);
        tokio::select! {
            result = serving => Ok(result?),
            () = async { stop.cancelled().await; tokio::time::sleep(SHUTDOWN_GRACE).await } => Ok(()),
        }
    }
}

/// Names of the health service that share a state.
struct Health {
    names: Vec<&'static str>,
    /// `None`: always.
    serving: Option<watch::Receiver<bool>>,
    reporter: HealthReporter,
}

impl Health {
    async fn announce(&self) {
        let serving = self.serving.as_ref().is_none_or(|serving| *serving.borrow());
        self.set(if serving { ServingStatus::Serving } else { ServingStatus::NotServing }).await;
    }

    async fn set(&self, status: ServingStatus) {
        for name in &self.names {
            self.reporter.set_service_status(name, status).await;
        }
    }

    /// Tells of every change until `stop`, and then that it is over.
    async fn follow(mut self, stop: &CancellationToken) {
        while let Some(serving) = &mut self.serving
            && let Some(Ok(())) = stop.run_until_cancelled(serving.changed()).await
        {
            self.announce().await;
        }
        stop.cancelled().await;
        self.set(ServingStatus::NotServing).await;
    }
}
