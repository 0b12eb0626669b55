"""The lock of the test environment with the licences of its packages."""
