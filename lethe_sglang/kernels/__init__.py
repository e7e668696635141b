"""Device work, each as a torch function that runs on any device."""
