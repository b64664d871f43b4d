"""`testreg demo`: calibrates and patches the small model that comes with the package."""
