"""What is measured of trained SAEs and their latents."""
