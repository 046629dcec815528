//! Templates: for an image and a shape a machine that was booted once and saved when its agent served and nobody had told it who it is. VMs
//! are restored from it instead of booted, and told then.
//!
//! ```text
//! VM_STATE_DIR/.templates/<key>/              a template: what the hypervisor saved, and template.json
//!                         <key>.new/machine   one that is being made: a machine's directory like any other
//!                         <key>.new/saved     becomes <key> when it is whole and on the disk
//!                         <key>.deleted       what is left of one
//! ```
//! The key is a digest of all that a template depends on ([`crate::hypervisor::Templates::basis`]): after an update of the image, the hypervisor
//! or the machine's kernel there is none of that key, and those of the old one are deleted.
//!
//! A template is a help and never a need. A VM that finds none boots, and one that can't be restored boots, too. When VMs can't be restored
//! from two templates of a key, and nothing else is to blame, none is made of it for an hour. One is made in the
//! background after a VM of that kind has booted; it counts as a VM while it does, and gives way as soon as a VM needs the room. Its
//! processes are marked like those of VMs, so that the next start ends what a killed vmhost leaves, and `invariants` what is left
//! otherwise.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use blixard::{
    error::Reason,
    id::VmId,
    pb::guest::v1::{GuestNetwork, Mount},
    time::Timestamp,
    volume::Volumes,
};
use blixard_chassis::Tasks;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    absent::{DELETED, gone},
    blocking::blocking,
    driver::with_sources,
    guest::AgentLink,
    host::Host,
    hypervisor::{Hypervisor, Launch, Machine, end_marked, marked_below},
    volumes::{Prepared, Room},
};

/// Templates that wait to be made. More are asked for again by the next VM that boots.
const QUEUED: usize = 16;
/// How long making one may take: booting, and writing its memory to disk.
const MAKE_PATIENCE: Duration = Duration::from_secs(300);
/// How long a restored guest may take to answer and to be told who it is: a second, and the rest for a loaded host. Then it is booted.
const RESTORE_PATIENCE: Duration = Duration::from_secs(30);
/// One that was used so lately is not deleted to make room for another: kinds of VMs that take turns would only make templates.
const KEPT_FOR: Duration = Duration::from_secs(600);
/// After so many templates of a key from which a VM could not be restored no more are made of it …
const FAILURES: u32 = 2;
/// … for so long: what was wrong with the machine may be over.
const OFF_FOR: Duration = Duration::from_secs(3600);

const ABOUT: &str = "template.json";
const NEW: &str = "new";
/// Where the machine is of one that is being made.
const MACHINE: &str = "machine";

/// What is known of a template, beside it on the disk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct About {
    image: String,
    vcpus: u32,
    memory_mib: u32,
    made_at: Timestamp,
    /// The size of each file.
    files: BTreeMap<String, u64>,
    /// What they take of the disk.
    disk_bytes: u64,
}

impl About {
    fn is_for(&self, launch: &Launch) -> bool {
        (&self.image, self.vcpus, self.memory_mib) == (&launch.image, launch.vcpus, launch.memory_mib)
    }

    /// The template in a directory, if it is whole.
    fn read(dir: &Path) -> Option<Self> {
        let about: Self = serde_json::from_slice(&fs::read(dir.join(ABOUT)).ok()?).ok()?;
        let whole = |(name, size): (&String, &u64)| fs::metadata(dir.join(name)).is_ok_and(|file| file.len() == *size);
        about.files.iter().all(whole).then_some(about)
    }
}

#[derive(Debug)]
struct Known {
    about: About,
    last_used: Instant,
    /// How many VMs are being restored from it.
    users: usize,
}

/// The one that is being made.
#[derive(Debug, Clone)]
struct Making {
    key: String,
    memory_mib: u32,
    give_way: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    known: BTreeMap<String, Known>,
    making: Option<Making>,
    /// By key, of late: how often VMs could not be restored, or [`FAILURES`] when no template could be made.
    failures: BTreeMap<String, Failures>,
}

#[derive(Debug, Clone, Copy)]
struct Failures {
    times: u32,
    last: Instant,
}

impl State {
    /// Takes so many more failures of a key; true: from now on there are no templates of it for a while.
    fn failed(&mut self, key: &str, times: u32, now: Instant) -> bool {
        let was_off = self.is_off(key, now);
        let failures = self.failures.entry(key.to_owned()).or_insert(Failures { times: 0, last: now });
        *failures = Failures { times: failures.times + times, last: now };
        !was_off && self.is_off(key, now)
    }

    /// Whether there are to be no templates of a key now.
    fn is_off(&mut self, key: &str, now: Instant) -> bool {
        self.failures.retain(|_, failures| now.duration_since(failures.last) < OFF_FOR);
        self.failures.get(key).is_some_and(|failures| failures.times >= FAILURES)
    }
}

/// The templates of a node.
#[derive(Debug)]
pub(crate) struct TemplateStore {
    dir: PathBuf,
    /// How many there may be.
    most: usize,
    state: Mutex<State>,
    wanted: mpsc::Sender<Launch>,
}

/// Launches of which templates are wanted.
pub(crate) type Wanted = mpsc::Receiver<Launch>;

impl TemplateStore {
    /// Takes up what an earlier vmhost left below the state directory: ends what it was making, deletes what is not whole or not
    /// current. When that can't be done there are no templates.
    pub(crate) async fn open(state_dir: &Path, most: u32, hypervisor: &Arc<dyn Hypervisor>) -> (Self, Wanted) {
        let dir = state_dir.join(".templates");
        let most = if hypervisor.templates().is_some() { most as usize } else { 0 };
        let (most, known) = match clean(&dir, most, hypervisor).await {
            Ok(known) => (most, known),
            Err(error) => {
                tracing::error!(dir = %dir.display(), %error, "templates can't be used; every VM boots");
                (0, BTreeMap::new())
            }
        };
        let (wanted, receiver) = mpsc::channel(QUEUED);
        let state = Mutex::new(State { known, ..State::default() });
        (Self { dir, most, state, wanted }, receiver)
    }

    /// A VM of this kind has booted, so a template would have helped.
    pub(crate) fn want(&self, launch: &Launch) {
        if self.most > 0 {
            let launch = Launch { nic: None, ..launch.clone() };
            // Enough are waiting.
            let _ = self.wanted.try_send(launch);
        }
    }

    /// The memory of the one that is being made.
    pub(crate) fn being_made(&self) -> Option<u32> {
        self.lock().making.as_ref().map(|making| making.memory_mib)
    }

    /// The one that is being made is given up: a VM needs its room.
    pub(crate) fn give_way(&self) {
        if let Some(making) = &self.lock().making {
            making.give_way.cancel();
        }
    }

    /// Whether what lies at or below `path` is a template's.
    pub(crate) fn owns(&self, path: &Path) -> bool {
        path.starts_with(&self.dir)
    }

    /// What lies in the directory. Blocking.
    pub(crate) fn entries(&self) -> io::Result<Vec<PathBuf>> {
        entries(&self.dir)
    }

    /// Whether the machine that is being made a template of is in this directory.
    pub(crate) fn makes_in(&self, dir: &Path) -> bool {
        let key = self.lock().making.as_ref().map(|making| making.key.clone());
        key.is_some_and(|key| dir == self.dir.join(key).with_extension(NEW).join(MACHINE))
    }

    /// Whether this directory has its place here now.
    pub(crate) fn accounts_for(&self, path: &Path) -> bool {
        let Some(name) = path.strip_prefix(&self.dir).ok().and_then(|path| path.components().next()) else {
            return false;
        };
        let state = self.lock();
        let name = Path::new(name.as_os_str());
        let key = name.file_stem().unwrap_or_default().to_string_lossy();
        match name.extension() {
            None => state.known.contains_key(&*key),
            Some(extension) => extension == NEW && state.making.as_ref().is_some_and(|making| making.key == key),
        }
    }

    /// Deletes what has no place here. Blocking.
    pub(crate) fn delete_leftover(&self, path: &Path) -> io::Result<()> {
        let deleted = path.with_extension(DELETED);
        if self.accounts_for(path) {
            return Err(io::Error::other(format!("{} is in use again", path.display())));
        }
        if path != deleted {
            fs::rename(path, &deleted)?;
        }
        fs::remove_dir_all(deleted)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A template for this launch. Those for such launches whose key is another are deleted: they will never be used again.
    async fn find(self: &Arc<Self>, host: &Host, launch: &Launch) -> Option<Template> {
        if !self.lock().known.values().any(|known| known.about.is_for(launch)) {
            return None;
        }
        let key = key(&host.hypervisor, launch).await.ok()?;
        self.delete_others(launch, &key).await;
        let dir = self.dir.join(&key);
        let looked = dir.clone();
        let whole = tokio::task::spawn_blocking(move || About::read(&looked)).await.ok()?;
        if whole.is_none() {
            tracing::warn!(image = launch.image, template = key, "a template is not whole any more and is dropped");
            self.delete(&key).await;
            return None;
        }
        let mut state = self.lock();
        let known = state.known.get_mut(&key)?;
        (known.users, known.last_used) = (known.users + 1, Instant::now());
        let made_at = known.about.made_at;
        drop(state);
        Some(Template { key, made_at, dir, store: Arc::clone(self) })
    }

    async fn delete_others(&self, launch: &Launch, key: &str) {
        let others = |(other, known): (&String, &Known)| {
            (known.about.is_for(launch) && other != key && known.users == 0).then(|| other.clone())
        };
        let stale: Vec<String> = self.lock().known.iter().filter_map(others).collect();
        for stale in stale {
            tracing::info!(image = launch.image, template = stale, "a template is out of date and is deleted");
            self.delete(&stale).await;
        }
    }

    /// A VM can't be restored from it, and that is its fault. Of several such VMs the first one counts.
    async fn drop_failed(&self, image: &str, key: &str, made_at: Timestamp) {
        let off = {
            let mut state = self.lock();
            if state.known.get(key).is_none_or(|known| known.about.made_at != made_at) {
                return;
            }
            state.failed(key, 1, Instant::now())
        };
        if off {
            let seconds = OFF_FOR.as_secs();
            tracing::warn!(
                image,
                template = key,
                seconds,
                "VMs of this kind can't be restored and are booted for a while"
            );
        }
        self.delete(key).await;
    }

    async fn delete(&self, key: &str) {
        let dir = self.dir.join(key);
        if self.lock().known.remove(key).is_some()
            && let Err(error) = blocking(move || delete(&dir)).await
        {
            tracing::error!(template = key, %error, "a template can't be deleted");
        }
    }

    /// Makes room for one more; false: those that there are were used lately.
    async fn make_room(&self) -> bool {
        loop {
            let oldest = {
                let state = self.lock();
                if state.known.len() < self.most {
                    return true;
                }
                let old = |known: &&Known| known.users == 0 && known.last_used.elapsed() >= KEPT_FOR;
                let old = state.known.iter().filter(|(_, known)| old(known));
                old.min_by_key(|(_, known)| known.last_used).map(|(key, _)| key.clone())
            };
            let Some(oldest) = oldest else { return false };
            tracing::info!(template = oldest, "a template makes room for another");
            self.delete(&oldest).await;
        }
    }
}

/// A template in use: it is not deleted to make room meanwhile.
struct Template {
    key: String,
    made_at: Timestamp,
    dir: PathBuf,
    store: Arc<TemplateStore>,
}

impl Drop for Template {
    fn drop(&mut self) {
        if let Some(known) = self.store.lock().known.get_mut(&self.key) {
            known.users = known.users.saturating_sub(1);
        }
    }
}

/// The one that is being made, for as long as it is.
struct Place<'a>(&'a TemplateStore);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.lock().making = None;
    }
}

/// A machine that runs.
pub(crate) struct Started {
    pub(crate) machine: Arc<dyn Machine>,
    /// The way to its agent.
    pub(crate) link: Arc<AgentLink>,
    /// Whether it was restored, and told who it is already.
    pub(crate) restored: bool,
}

/// Starts a VM's machine: restored from a template if there is one, else booted.
///
/// # Errors
/// Why not, in words. Nothing of it runs then.
pub(crate) async fn start(
    host: &Arc<Host>,
    launch: &Launch,
    volumes: &Volumes,
    network: Option<GuestNetwork>,
) -> Result<Started, String> {
    host.attach(launch).await?;
    if !volumes.is_empty() {
        let Prepared { disks, mounts } = host.prepare(volumes, &launch.dir).await?;
        return boot(host, &Launch { disks, ..launch.clone() }, network, mounts).await;
    }
    if let Some(template) = host.templates.find(host, launch).await {
        match restore(host, launch, &template, network.clone()).await {
            Ok(started) => {
                host.templates.lock().failures.remove(&template.key);
                return Ok(started);
            }
            Err(NotRestored { problem, is_the_templates }) => {
                let (key, made_at) = (template.key.clone(), template.made_at);
                drop(template);
                tracing::warn!(
                    vm_id = %launch.vm_id,
                    image = launch.image,
                    template = key,
                    problem,
                    dropped = is_the_templates,
                    "a VM can't be restored from its template; it is booted"
                );
                if is_the_templates {
                    host.templates.drop_failed(&launch.image, &key, made_at).await;
                }
                renew(host, launch).await?;
            }
        }
    }
    boot(host, launch, network, vec![]).await
}

async fn boot(
    host: &Arc<Host>,
    launch: &Launch,
    network: Option<GuestNetwork>,
    mounts: Vec<Mount>,
) -> Result<Started, String> {
    let machine = host.hypervisor.launch(launch).await.map_err(|error| with_sources(&error))?;
    let link = Arc::new(AgentLink::new(launch.vm_id, Arc::clone(&machine), network, mounts, false));
    Ok(Started { machine, link, restored: false })
}

/// Why a VM was not restored.
struct NotRestored {
    problem: String,
    /// Whether another one would not be either: the hypervisor refuses what was saved, or the guest does not come back. Not so when the host
    /// or its vmhost is to blame.
    is_the_templates: bool,
}

async fn restore(
    host: &Arc<Host>,
    launch: &Launch,
    template: &Template,
    network: Option<GuestNetwork>,
) -> Result<Started, NotRestored> {
    // What a machine is short of a template can't give it.
    let sound = || host.pressure.borrow().pressure.is_empty() && !host.tasks.token().is_cancelled();
    let failed = |problem, is_the_templates| NotRestored { problem, is_the_templates: is_the_templates && sound() };
    let Some(templates) = host.hypervisor.templates() else {
        return Err(failed("this driver restores no machine".to_owned(), false));
    };
    let restored = templates.restore(launch, &template.dir).await;
    let machine = restored.map_err(|error| failed(with_sources(&error), error.is_the_templates()))?;
    let link = Arc::new(AgentLink::new(launch.vm_id, Arc::clone(&machine), network, vec![], true));
    let introduced = tokio::time::timeout(RESTORE_PATIENCE, link.introduce());
    let failed = tokio::select! {
        introduced = introduced => match introduced {
            Ok(Ok(_)) => return Ok(Started { machine, link, restored: true }),
            Ok(Err(error)) => failed(error.to_string(), error.reason == Reason::GuestRefused),
            Err(_) => failed(format!("its agent did not answer within {} s", RESTORE_PATIENCE.as_secs()), true),
        },
        exit = machine.wait() => failed(exit.to_string(), !exit.is_the_hosts_doing()),
    };
    machine.kill().await;
    Err(failed)
}

/// An empty directory for another try.
async fn renew(host: &Host, launch: &Launch) -> Result<(), String> {
    let left = host.hypervisor.sweep(launch).await.map_err(|error| with_sources(&error))?;
    if left > 0 {
        tracing::error!(vm_id = %launch.vm_id, left, "processes of a VM that could not be restored were left");
    }
    let renewed = host.state.vm(launch.vm_id).renew_machine().await;
    renewed.map_err(|error| format!("the directory of a machine can't be emptied: {error}"))
}

/// Makes the templates that are wanted, one after the other, until vmhost ends.
pub(crate) async fn keep(host: &Arc<Host>, mut wanted: Wanted) {
    let ends = host.tasks.token().clone();
    while let Some(Some(launch)) = ends.run_until_cancelled(wanted.recv()).await {
        make(host, &launch).await;
    }
}

/// Why no template was made.
enum NotMade {
    /// Its time has not come; a VM that boots asks again.
    Now(String),
    /// It can't be, for a while at least.
    Soon(String),
}

async fn make(host: &Arc<Host>, launch: &Launch) {
    let store = &host.templates;
    let key = match key(&host.hypervisor, launch).await {
        Ok(key) => key,
        Err(problem) => return tracing::debug!(image = launch.image, problem, "no template is made"),
    };
    store.delete_others(launch, &key).await;
    {
        let mut state = store.lock();
        if state.known.contains_key(&key) || state.is_off(&key, Instant::now()) {
            return;
        }
    }
    let begun = Instant::now();
    match try_to_make(host, launch, &key).await {
        Ok(about) => {
            let mib = about.disk_bytes / (1024 * 1024);
            let (image, vcpus, memory_mib) = (&about.image, about.vcpus, about.memory_mib);
            let seconds = begun.elapsed().as_secs_f32();
            tracing::info!(image, vcpus, memory_mib, template = key, mib, seconds, "template made");
            store.lock().known.insert(key, Known { about, last_used: Instant::now(), users: 0 });
        }
        Err(NotMade::Now(why)) => tracing::debug!(image = launch.image, template = key, why, "no template is made now"),
        Err(NotMade::Soon(problem)) => {
            tracing::warn!(
                image = launch.image,
                vcpus = launch.vcpus,
                memory_mib = launch.memory_mib,
                template = key,
                problem,
                seconds = OFF_FOR.as_secs(),
                "no template can be made; VMs of this kind are booted for a while"
            );
            store.lock().failed(&key, FAILURES, Instant::now());
        }
    }
}

async fn try_to_make(host: &Arc<Host>, wanted: &Launch, key: &str) -> Result<About, NotMade> {
    let store = &*host.templates;
    if !store.make_room().await {
        return Err(NotMade::Now(format!("the {} that this node may keep were used lately", store.most)));
    }
    let give_way = host.tasks.token().child_token();
    let making = Making { key: key.to_owned(), memory_mib: wanted.memory_mib, give_way: give_way.clone() };
    if !host.has_room_for_template(making.memory_mib, || store.lock().making = Some(making)) {
        return Err(NotMade::Now("this node has no room for another VM".to_owned()));
    }
    let place = Place(store);
    let (new, whole) = (store.dir.join(key).with_extension(NEW), store.dir.join(key));
    let (prepared, needed_mib, on) = (new.clone(), wanted.memory_mib.into(), Arc::clone(host));
    let prepared = blocking(move || prepare(&prepared, needed_mib, || on.disk_room(&on.vms()))).await;
    prepared.map_err(|error| NotMade::Now(error.to_string()))?;
    let vm_id = VmId::random();
    let given = host.containment.lease(vm_id).map_err(|error| NotMade::Now(error.message))?;
    let io_max = host.containment.io_max();
    let contained = Launch { user: given.user, cgroup: given.cgroup, io_max, ..wanted.clone() };
    let launch = Launch { vm_id, dir: new.join(MACHINE), nic: None, ..contained };
    let saved = save(host, &launch, &new.join("saved"), &give_way).await;
    // A machine that was given up in the middle still runs.
    let swept = host.hypervisor.sweep(&launch).await;
    if let Err(error) = swept {
        tracing::error!(template = key, error = with_sources(&error), "processes of a template are left");
    }
    host.containment.give_back(vm_id);
    let finished = match saved {
        Ok(()) => {
            let (new, launch) = (new.clone(), launch.clone());
            blocking(move || finish(&new, &whole, &launch)).await.map_err(|error| NotMade::Soon(error.to_string()))
        }
        Err(problem) => Err(problem),
    };
    if let Err(error) = blocking(move || delete(&new)).await {
        tracing::error!(template = key, %error, "what is left of making a template can't be deleted");
    }
    drop(place);
    finished
}

async fn save(host: &Host, launch: &Launch, into: &Path, give_way: &CancellationToken) -> Result<(), NotMade> {
    let templates =
        host.hypervisor.templates().ok_or_else(|| NotMade::Soon("this driver saves no machine".to_owned()))?;
    let saved = give_way.run_until_cancelled(tokio::time::timeout(MAKE_PATIENCE, templates.save(launch, into))).await;
    match saved {
        Some(Ok(Ok(()))) => Ok(()),
        Some(Ok(Err(error))) => Err(NotMade::Soon(with_sources(&error))),
        Some(Err(_)) => Err(NotMade::Soon(format!("it was not ready within {} s", MAKE_PATIENCE.as_secs()))),
        None => Err(NotMade::Now("it gave way".to_owned())),
    }
}

async fn key(hypervisor: &Arc<dyn Hypervisor>, launch: &Launch) -> Result<String, String> {
    let (hypervisor, launch) = (Arc::clone(hypervisor), launch.clone());
    tokio::task::spawn_blocking(move || key_of(&*hypervisor, &launch)).await.map_err(|error| error.to_string())?
}

fn key_of(hypervisor: &dyn Hypervisor, launch: &Launch) -> Result<String, String> {
    let templates = hypervisor.templates().ok_or("this driver saves no machine")?;
    let basis = templates.basis(launch).map_err(|error| with_sources(&error))?;
    // What the agent of this version is expected to do when it is restored.
    let basis = format!("{} {basis}", env!("CARGO_PKG_VERSION"));
    let digest = Sha256::digest(basis.as_bytes());
    Ok(hex::encode(&digest[..16]))
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    gone(fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()))
}

async fn clean(dir: &Path, most: usize, hypervisor: &Arc<dyn Hypervisor>) -> io::Result<BTreeMap<String, Known>> {
    let marked = dir.to_owned();
    let left = tokio::task::spawn_blocking(move || marked_below(&marked)).await?;
    end_marked(&left).await.map_err(io::Error::other)?;
    // What else such a machine held is in its record.
    for path in entries(dir)?.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == NEW)) {
        let machine = path.join(MACHINE);
        hypervisor.sweep(&nobodys(String::new(), 1, 1, machine)).await.map_err(io::Error::other)?;
    }
    let (dir, hypervisor) = (dir.to_owned(), Arc::clone(hypervisor));
    blocking(move || take_up(&dir, most, &*hypervisor)).await
}

/// The launch of no VM.
fn nobodys(image: String, vcpus: u32, memory_mib: u32, dir: PathBuf) -> Launch {
    let vm_id = VmId(uuid::Uuid::nil());
    Launch { vm_id, image, vcpus, memory_mib, dir, nic: None, user: None, cgroup: None, io_max: None, disks: vec![] }
}

/// What an earlier vmhost left that is whole and current; the rest is deleted.
fn take_up(dir: &Path, most: usize, hypervisor: &dyn Hypervisor) -> io::Result<BTreeMap<String, Known>> {
    let mut known = BTreeMap::new();
    for path in entries(dir)? {
        let key = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let current = |about: &About| {
            let launch = nobodys(about.image.clone(), about.vcpus, about.memory_mib, PathBuf::new());
            key_of(hypervisor, &launch).is_ok_and(|current| current == key)
        };
        match About::read(&path).filter(current) {
            Some(about) if known.len() < most => {
                known.insert(key, Known { about, last_used: Instant::now(), users: 0 });
            }
            Some(_) | None => delete(&path)?,
        }
    }
    if most == 0 {
        gone(fs::remove_dir(dir))?;
    }
    Ok(known)
}

/// Makes the directories of one that is to be made, on a disk that has room for it beside what others were promised.
fn prepare(new: &Path, needed_mib: u64, room: impl FnOnce() -> io::Result<Room>) -> io::Result<()> {
    delete(new)?;
    let private = |path: PathBuf| DirBuilder::new().mode(0o700).recursive(true).create(path);
    private(new.join(MACHINE))?;
    private(new.join("saved"))?;
    let room = room()?;
    if room.fits(needed_mib) {
        return Ok(());
    }
    let left = room.free_mib;
    Err(io::Error::other(format!("the disk has {left} MiB to give, and a template takes up to {needed_mib}")))
}

/// Makes a template of what was saved: described, on the disk, and then in its place.
fn finish(new: &Path, whole: &Path, launch: &Launch) -> io::Result<About> {
    let saved = new.join("saved");
    let (mut files, mut disk_bytes) = (BTreeMap::new(), 0);
    for path in entries(&saved)? {
        // Nobody writes to it any more: VMs may have it mapped.
        fs::set_permissions(&path, Permissions::from_mode(0o444))?;
        let file = File::open(&path)?;
        file.sync_all()?;
        let metadata = file.metadata()?;
        files.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), metadata.len());
        disk_bytes += metadata.blocks() * 512;
    }
    let (image, vcpus, memory_mib) = (launch.image.clone(), launch.vcpus, launch.memory_mib);
    let about = About { image, vcpus, memory_mib, made_at: Timestamp::now(), files, disk_bytes };
    fs::write(saved.join(ABOUT), serde_json::to_vec_pretty(&about)?)?;
    File::open(saved.join(ABOUT))?.sync_all()?;
    File::open(&saved)?.sync_all()?;
    fs::rename(&saved, whole)?;
    File::open(whole.parent().unwrap_or(whole))?.sync_all()?;
    Ok(about)
}

/// Deletes a template's directory, if it is there. One that is half deleted is none.
fn delete(dir: &Path) -> io::Result<()> {
    gone(fs::remove_file(dir.join(ABOUT)))?;
    gone(fs::remove_dir_all(dir))
}

/// Keeps making templates, in a task of its own.
pub(crate) fn spawn_maker(host: &Arc<Host>, wanted: Wanted, tasks: &Tasks) {
    let host = Arc::clone(host);
    // Not cut off at vmhost's end: it takes its machine along.
    tasks.spawn("vmhost-templates", async move { keep(&host, wanted).await });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_off_after_two_failures_of_late_and_comes_back() {
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        let mut state = State::default();
        assert!(!state.failed("a", 1, begin) && !state.is_off("a", begin));
        assert!(!state.failed("b", 1, after(3599)), "another key's do not count");
        assert!(!state.failed("a", 1, after(3600)), "the first was long ago");
        assert!(state.failed("a", 1, after(3700)), "this switches it off");
        assert!(!state.failed("a", 1, after(3800)), "which is told once");
        assert!(state.is_off("a", after(3800 + 3599)) && !state.is_off("b", after(3800)));
        assert!(!state.is_off("a", after(3800 + 3600)) && state.failures.is_empty(), "it is forgotten");
        assert!(state.failed("a", FAILURES, after(9000)) && state.is_off("a", after(9000)));
    }

    #[test]
    fn what_is_promised_to_scratch_disks_is_not_taken_for_a_template() {
        let dir = tempfile::tempdir().expect("tempdir");
        let new = dir.path().join("key.new");
        let room = || Ok(Room { total_mib: 10_000, free_mib: 500 });
        prepare(&new, 500, room).expect("there is room");
        assert!(new.join(MACHINE).is_dir() && new.join("saved").is_dir());
        let refused = prepare(&new, 501, room).expect_err("no room").to_string();
        assert_eq!(refused, "the disk has 500 MiB to give, and a template takes up to 501");
    }
}
