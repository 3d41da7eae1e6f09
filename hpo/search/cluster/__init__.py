"""The Ray cluster: started or joined, checked, followed as its nodes come and go, and given the driver's code."""
