"""What testreg costs, measured."""
