"""The lock of the test environment and the licences of its packages."""
