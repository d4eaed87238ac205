// Energy, temperature, frequency and throttling, where a machine has sensors (edgestill/runtimes/sensors.py).
#pragma once

#include "exchange.h"

#include <string>

// One reading. `root` is where `sys` is looked for ("" for this machine).
json read_sensors(const std::string & root);
