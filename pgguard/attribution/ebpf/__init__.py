# SPDX-License-Identifier: Apache-2.0
"""Who sent these bytes, over TCP: the kernel tells, through programs that run where a client sends."""
