"""What a cluster's own engine needs to start the processes of a run; one file a target, each a pure function."""
