# The registry's trial: three replicas under kill -9, pauses and partitions. SEED repeats what a run tried.
.PHONY: chaos-registry
chaos-registry:
	@scripts/setup.sh test
	BLIXARD_CHAOS_SEED=$(SEED) BLIXARD_CHAOS_SECONDS=$(or $(SECONDS),300) \
		cargo test -p blixard-registry --test chaos -- --include-ignored --test-threads=1
