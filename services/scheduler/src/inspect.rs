//! What became of a job, from records: why it is where it is, and the files that its attempts left.

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId},
    job::{Job, JobState},
    pb::{common::v1 as common, registry::v1 as registry, scheduler::v1 as pb, vmhost::v1 as vmhost},
};
use blixard_chassis::client::forward;
use futures::{Stream, StreamExt as _};
use tonic::{Request, Status};

use crate::{
    peers::{missing, peer_error},
    service::{SchedulerApi, refused},
};

impl SchedulerApi {
    pub(crate) async fn explain(
        &self,
        caller: &Request<pb::ExplainJobRequest>,
    ) -> Result<pb::ExplainJobResponse, Status> {
        let job_id = JobId::parse("job_id", &caller.get_ref().job_id)?;
        let job = self.find_job(caller, job_id).await?;
        let waiting = match job.state {
            JobState::Queued => self.shell.explain(job_id).await?,
            _ => None,
        };
        let attempts = self.attempts(caller, job_id).await?;
        Ok(pb::ExplainJobResponse { job: Some(job.into()), attempts, waiting })
    }

    pub(crate) async fn artifacts(
        &self,
        caller: &Request<pb::ListArtifactsRequest>,
    ) -> Result<pb::ListArtifactsResponse, Status> {
        let asked = caller.get_ref();
        let place = self.locate(caller, &asked.job_id, asked.attempt).await?;
        let list = vmhost::ListArtifactsRequest { job_id: place.job_id.to_string(), attempt: place.attempt };
        let answer = self.peers.vmhost(&place.node_id)?.list_artifacts(forward(caller, list)).await;
        let artifacts = answer.map_err(|status| peer_error("vmhost", &status))?.into_inner().artifacts;
        Ok(pb::ListArtifactsResponse { artifacts, attempt: place.attempt })
    }

    pub(crate) async fn artifact(
        &self,
        caller: &Request<pb::GetArtifactRequest>,
    ) -> Result<impl Stream<Item = Result<pb::GetArtifactResponse, Status>> + Send + 'static, Status> {
        let asked = caller.get_ref();
        let place = self.locate(caller, &asked.job_id, asked.attempt).await?;
        let get = vmhost::GetArtifactRequest {
            job_id: place.job_id.to_string(),
            attempt: place.attempt,
            path: asked.path.clone(),
            offset: asked.offset,
        };
        // A stream lives as long as its caller reads: no deadline of ours.
        let answer = self.peers.vmhost(&place.node_id)?.get_artifact(get).await;
        let parts = answer.map_err(|status| peer_error("vmhost", &status))?.into_inner();
        Ok(parts.map(|part| match part {
            Ok(part) => Ok(pb::GetArtifactResponse { artifact: part.artifact, data: part.data }),
            Err(status) => Err(peer_error("vmhost", &status).into()),
        }))
    }

    /// Where an attempt ran: its node has what it left.
    async fn locate<T>(&self, caller: &Request<T>, job_id: &str, attempt: u32) -> Result<Place, Status> {
        let job_id = JobId::parse("job_id", job_id)?;
        let job = self.find_job(caller, job_id).await?;
        let wanted = if attempt == 0 { job.attempt } else { attempt };
        let node_id = match job.node_id.filter(|_| wanted > 0 && wanted == job.attempt) {
            Some(node_id) => Some(node_id),
            None if wanted == 0 || wanted > job.attempt => None,
            None => {
                let attempts = self.attempts(caller, job_id).await?;
                let found = attempts.into_iter().find(|attempt| attempt.attempt == wanted);
                found.map(|attempt| NodeId::parse("attempt.node_id", &attempt.node_id)).transpose()?
            }
        };
        let Some(node_id) = node_id else {
            let message = match job.attempt {
                0 => format!("job {job_id} has not had an attempt yet"),
                latest => format!("job {job_id} has no attempt {wanted} on record; its latest is {latest}"),
            };
            let error = Error::new(Reason::ArtifactNotFound, message);
            return Err(error.with("job_id", job_id).with("attempt", wanted).with("path", "").into());
        };
        Ok(Place { job_id, attempt: wanted, node_id })
    }

    async fn find_job<T>(&self, caller: &Request<T>, job_id: JobId) -> Result<Job, Status> {
        let get = registry::GetJobRequest { job_id: job_id.to_string() };
        let answer = self.peers.registry().get_job(forward(caller, get)).await.map_err(refused)?;
        Ok(Job::try_from(answer.into_inner().job.ok_or_else(|| missing("job"))?)?)
    }

    async fn attempts<T>(&self, caller: &Request<T>, job_id: JobId) -> Result<Vec<common::Attempt>, Status> {
        let list = registry::ListAttemptsRequest { job_id: job_id.to_string() };
        let answer = self.peers.registry().list_attempts(forward(caller, list)).await.map_err(refused)?;
        Ok(answer.into_inner().attempts)
    }
}

/// Which attempt, and the node that it ran on.
struct Place {
    job_id: JobId,
    attempt: u32,
    node_id: NodeId,
}
