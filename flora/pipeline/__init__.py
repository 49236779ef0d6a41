"""The jobs: what chains the packages for one command."""
