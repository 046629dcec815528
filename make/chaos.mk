# The registry's trial: three replicas under kill -9, pauses and partitions. SEED repeats what a run tried.
.PHONY: chaos-registry chaos-scheduler chaos-node
chaos-registry:
	@scripts/setup.sh test
	BLIXARD_CHAOS_SEED=$(SEED) BLIXARD_CHAOS_SECONDS=$(or $(SECONDS),300) \
		cargo test -p blixard-registry --test chaos -- --include-ignored --test-threads=1

# The scheduler's: three registries, two schedulers, three vmhosts and their jobs.
chaos-scheduler:
	@scripts/setup.sh test
	cargo build --quiet --workspace --bins
	BLIXARD_CHAOS_SEED=$(SEED) BLIXARD_CHAOS_SECONDS=$(or $(SECONDS),600) BLIXARD_CHAOS_JOBS=$(or $(JOBS),5000) \
		cargo test -p mvm-ci --test chaos -- --nocapture whatever_happens

# A node's: VMs that begin and end while its vmhost is killed, plain processes and guests under QEMU.
chaos-node:
	@scripts/setup.sh test
	cargo build --quiet --workspace --bins
	BLIXARD_CHAOS_SEED=$(SEED) BLIXARD_CHAOS_CYCLES=$(or $(CYCLES),1000) BLIXARD_CHAOS_GUESTS=$(or $(GUESTS),20) \
		cargo test -p mvm-ci --test cycles -- --nocapture
