"""Training on several devices: meshes, placements and collective operations."""
