"""What runs the pipeline for a team: servers on one machine, containers, Kubernetes."""
