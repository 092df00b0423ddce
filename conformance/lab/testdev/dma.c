// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the device writes into the guest's memory: numbered pages, round and round, from the moment bus mastering is on. Before the
 * first of them after a load it reads all of them: each must hold the last number that the device gave it.
 */
#include <linux/bitmap.h>
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "testdev.h"

#define DMA_MAGIC 0x616d6476656474ULL
/* 16 GiB of pages. */
#define LOG_LIMIT (1UL << 22)

struct td_stamp {
	u64 magic;
	u64 number;
	u64 inverse;
	u64 address;
};

static struct td_stamp stamp(u64 number, u64 address)
{
	return (struct td_stamp){ DMA_MAGIC, number, ~number, address };
}

static void check_pages(struct testdev *td)
{
	const struct td_state *state = &td->state;
	u64 bad = 0, first = 0;

	for (u64 page = 0; page < state->dma_pages && page < state->dma_done; page++) {
		u64 address = state->dma_base + page * PAGE_SIZE;
		u64 rounds = (state->dma_done - 1 - page) / state->dma_pages;
		struct td_stamp wanted = stamp(page + rounds * state->dma_pages, address), found;

		if (vfio_dma_rw(&td->vdev, address, &found, sizeof(found), false) ||
		    memcmp(&wanted, &found, sizeof(found))) {
			if (!bad++)
				first = page;
		}
	}
	td_count(td, bad ? TD_C_CHECKS_BAD : TD_C_CHECKS_GOOD);
	td_add(td, TD_C_PAGES_BAD, bad);
	if (bad)
		pr_err("testdev: %llu of %llu pages are stale, the first is %llu\n", bad, state->dma_pages, first);
}

static void log_page(struct testdev *td, u64 address)
{
	u64 page = (address - td->log_base) / PAGE_SIZE;

	if (!td->log_bits)
		return;
	if (address < td->log_base || page >= td->log_count)
		td->log_all = true;
	else
		set_bit(page, td->log_bits);
}

static void write_pages(struct testdev *td)
{
	struct td_state *state = &td->state;

	for (u64 i = 0; i < td->parameters.dma_burst; i++) {
		u64 address = state->dma_base + state->dma_done % state->dma_pages * PAGE_SIZE;
		struct td_stamp now = stamp(state->dma_done, address);

		if (vfio_dma_rw(&td->vdev, address, &now, sizeof(now), true)) {
			td_count(td, TD_C_DMA_ERRORS);
			return;
		}
		state->dma_done++;
		td_count(td, TD_C_DMA_WRITES);
		log_page(td, address);
	}
}

static int dma_thread(void *opaque)
{
	struct testdev *td = opaque;

	while (!kthread_should_stop()) {
		u64 us = max(td->parameters.dma_interval_us, 50);

		mutex_lock(&td->lock);
		if (td_running(td->migration) && td->state.dma_pages && td_bus_master(td)) {
			if (td->check && td->state.dma_done)
				check_pages(td);
			td->check = false;
			write_pages(td);
		}
		mutex_unlock(&td->lock);
		usleep_range(us, us + us / 8);
	}
	return 0;
}

int td_dma_start(struct testdev *td)
{
	td->dma = kthread_run(dma_thread, td, "testdev-dma");
	return PTR_ERR_OR_ZERO(td->dma);
}

static void end_log(struct testdev *td)
{
	kvfree(td->log_bits);
	td->log_bits = NULL;
}

void td_dma_stop(struct testdev *td)
{
	kthread_stop(td->dma);
	mutex_lock(&td->lock);
	end_log(td);
	mutex_unlock(&td->lock);
}

static int log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 nnodes, u64 *page_size)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);
	int error;

	td_count(td, TD_C_LOG_STARTS);
	mutex_lock(&td->lock);
	error = td_fault(&td->faults[TD_CALL_LOG_START]);
	if (!error && td->log_bits)
		error = -EINVAL;
	if (!error) {
		td->log_base = td->state.dma_base;
		td->log_count = clamp(td->state.dma_pages, 1, LOG_LIMIT);
		td->log_all = false;
		td->log_bits = kvcalloc(BITS_TO_LONGS(td->log_count), sizeof(long), GFP_KERNEL_ACCOUNT);
		if (!td->log_bits)
			error = -ENOMEM;
		*page_size = PAGE_SIZE;
	}
	mutex_unlock(&td->lock);
	return error;
}

static int log_stop(struct vfio_device *vdev)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);
	int error;

	mutex_lock(&td->lock);
	error = td_fault(&td->faults[TD_CALL_LOG_STOP]);
	if (!error)
		end_log(td);
	mutex_unlock(&td->lock);
	return error;
}

static int log_report(struct vfio_device *vdev, unsigned long iova, unsigned long length, struct iova_bitmap *dirty)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);
	unsigned long page;
	int error;

	td_count(td, TD_C_LOG_REPORTS);
	mutex_lock(&td->lock);
	error = td_fault(&td->faults[TD_CALL_LOG_REPORT]);
	if (!error && !td->log_bits)
		error = -EINVAL;
	if (error || !td->parameters.log)
		goto out;
	/* Pages outside of what was in use when the log began are not told apart. */
	if (td->log_all) {
		iova_bitmap_set(dirty, iova, length);
		td_add(td, TD_C_LOG_PAGES, length / PAGE_SIZE);
		goto out;
	}
	for_each_set_bit(page, td->log_bits, td->log_count) {
		u64 address = td->log_base + page * PAGE_SIZE;

		if (address < iova || address - iova >= length)
			continue;
		iova_bitmap_set(dirty, address, PAGE_SIZE);
		clear_bit(page, td->log_bits);
		td_count(td, TD_C_LOG_PAGES);
	}
out:
	mutex_unlock(&td->lock);
	return error;
}

const struct vfio_log_ops td_log_ops = {
	.log_start = log_start,
	.log_stop = log_stop,
	.log_read_and_clear = log_report,
};
