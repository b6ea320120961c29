"""Where data come from: the tables of KEEL and of OpenML, and the wheels of packages that hold data."""
