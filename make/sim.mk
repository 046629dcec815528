# The simulation: years of failures in seconds. SEED repeats a run (RUNS seeds from there on), STEPS says how much happens before
# the faults stop, TRACE=1 prints all of it, WITHOUT=… takes a protection away (docs/SIMULATION.md).
.PHONY: sim
sim:
	@cargo run --quiet --release -p blixard-simulation -- --steps $(or $(STEPS),200000) --runs $(or $(RUNS),$(if $(SEED),1,50)) \
		$(if $(SEED),--seed $(SEED)) $(if $(WITHOUT),--without $(WITHOUT)) $(if $(TRACE),--trace)
