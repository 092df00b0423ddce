// SPDX-License-Identifier: GPL-2.0-only
/* Configuration space, BARs and registers. */
#include <linux/mm.h>
#include <linux/pci_regs.h>
#include <linux/uaccess.h>
#include <linux/unaligned.h>

#include "testdev.h"

#define MSI_AT 0x40
#define MSIX_AT 0x60
/* BAR 2: the table, and the pending bits behind it. */
#define MSIX_TABLE 0x000
#define MSIX_PBA 0x800

static void allow(struct testdev *td, unsigned int at, u32 mask, unsigned int bytes)
{
	for (unsigned int i = 0; i < bytes; i++)
		td->writable[at + i] = mask >> 8 * i;
}

/* Configuration space as after power-on, with what the guest may write in it. */
void td_pci_init(struct testdev *td)
{
	u8 *config = td->config;
	u8 *link = &config[PCI_CAPABILITY_LIST];

	memset(config, 0, sizeof(td->config));
	memset(td->writable, 0, sizeof(td->writable));
	put_unaligned_le16(TD_VENDOR, &config[PCI_VENDOR_ID]);
	put_unaligned_le16(TD_DEVICE, &config[PCI_DEVICE_ID]);
	put_unaligned_le16(TD_VENDOR, &config[PCI_SUBSYSTEM_VENDOR_ID]);
	put_unaligned_le16(TD_DEVICE, &config[PCI_SUBSYSTEM_ID]);
	put_unaligned_le16(PCI_STATUS_CAP_LIST, &config[PCI_STATUS]);
	config[PCI_CLASS_DEVICE + 1] = 0xff; /* no class */
	allow(td, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE, 2);
	allow(td, PCI_CACHE_LINE_SIZE, 0xff, 1);
	allow(td, PCI_LATENCY_TIMER, 0xff, 1);
	allow(td, PCI_INTERRUPT_LINE, 0xff, 1);
	for (unsigned int bar = 0; bar < 3; bar++)
		allow(td, PCI_BASE_ADDRESS_0 + 4 * bar, ~(u32)(TD_BAR_SIZE - 1), 4);
	if (td->parameters.interrupts & 1)
		config[PCI_INTERRUPT_PIN] = 1;
	if (td->parameters.interrupts & 2) {
		*link = MSI_AT;
		link = &config[MSI_AT + PCI_CAP_LIST_NEXT];
		config[MSI_AT] = PCI_CAP_ID_MSI;
		/* Four vectors. */
		put_unaligned_le16(PCI_MSI_FLAGS_64BIT | 2 << 1, &config[MSI_AT + PCI_MSI_FLAGS]);
		allow(td, MSI_AT + PCI_MSI_FLAGS, PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE, 2);
		allow(td, MSI_AT + PCI_MSI_ADDRESS_LO, ~3U, 4);
		allow(td, MSI_AT + PCI_MSI_ADDRESS_HI, ~0U, 4);
		allow(td, MSI_AT + PCI_MSI_DATA_64, 0xffff, 2);
	}
	if (td->parameters.interrupts & 4) {
		*link = MSIX_AT;
		config[MSIX_AT] = PCI_CAP_ID_MSIX;
		put_unaligned_le16(TD_VECTORS - 1, &config[MSIX_AT + PCI_MSIX_FLAGS]);
		put_unaligned_le32(MSIX_TABLE | 2, &config[MSIX_AT + PCI_MSIX_TABLE]);
		put_unaligned_le32(MSIX_PBA | 2, &config[MSIX_AT + PCI_MSIX_PBA]);
		allow(td, MSIX_AT + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL, 2);
	}
	if (*link == 0 && link == &config[PCI_CAPABILITY_LIST])
		config[PCI_STATUS] &= ~PCI_STATUS_CAP_LIST;
}

/* What a reset does: registers as after power-on, bus mastering off, BARs and capabilities as they are. */
void td_power_on(struct testdev *td)
{
	memset(&td->state, 0, sizeof(td->state));
	memset(page_address(td->shared), 0, TD_BAR_SIZE);
	td->state.dma_base = td->parameters.dma_iova;
	td->state.dma_pages = td->parameters.dma_pages;
	td->check = false;
	put_unaligned_le16(0, &td->config[PCI_COMMAND]);
	td_irq_update(td);
}

bool td_bus_master(struct testdev *td)
{
	return !td->parameters.dma_needs_bus_master || td->config[PCI_COMMAND] & PCI_COMMAND_MASTER;
}

bool td_intx_disabled(struct testdev *td)
{
	return get_unaligned_le16(&td->config[PCI_COMMAND]) & PCI_COMMAND_INTX_DISABLE;
}

static u32 register_read(struct testdev *td, u32 at)
{
	struct td_state *state = &td->state;

	switch (at) {
	case TD_REG_ID: return TD_ID;
	case TD_REG_COUNTER: return state->counter;
	case TD_REG_SCRATCH: return state->scratch;
	case TD_REG_PENDING: return state->pending;
	case TD_REG_RAISED: return state->raised;
	case TD_REG_DMA_LOW: return lower_32_bits(state->dma_base);
	case TD_REG_DMA_HIGH: return upper_32_bits(state->dma_base);
	case TD_REG_DMA_PAGES: return state->dma_pages;
	case TD_REG_DMA_DONE: return state->dma_done;
	default: return 0;
	}
}

static void register_write(struct testdev *td, u32 at, u32 value)
{
	struct td_state *state = &td->state;

	switch (at) {
	case TD_REG_COUNTER: state->counter = value; break;
	case TD_REG_SCRATCH: state->scratch = value; break;
	case TD_REG_RAISE: td_irq_raise(td, value); break;
	case TD_REG_PENDING:
		state->pending &= ~value;
		td_irq_update(td);
		break;
	case TD_REG_DMA_LOW:
		state->dma_base = (state->dma_base & ~0xffffffffULL) | (value & PAGE_MASK);
		state->dma_done = 0;
		break;
	case TD_REG_DMA_HIGH:
		state->dma_base = (u64)value << 32 | lower_32_bits(state->dma_base);
		state->dma_done = 0;
		break;
	case TD_REG_DMA_PAGES:
		state->dma_pages = value;
		state->dma_done = 0;
		break;
	}
}

/* Reads or writes one piece, of 1, 2, 4 or 8 bytes. Registers know 4 and 8 alone. */
static int access(struct testdev *td, unsigned int region, u32 at, u8 *bytes, size_t count, bool write)
{
	u8 *memory = page_address(td->shared);

	switch (region) {
	case VFIO_PCI_CONFIG_REGION_INDEX:
		for (size_t i = 0; i < count; i++) {
			u8 mask = td->writable[at + i], *byte = &td->config[at + i];

			if (write)
				*byte = (*byte & ~mask) | (bytes[i] & mask);
			else
				bytes[i] = *byte;
			if (!write && at + i == PCI_STATUS && td->state.pending)
				bytes[i] |= PCI_STATUS_INTERRUPT;
		}
		if (write)
			td_irq_update(td);
		return 0;
	case VFIO_PCI_BAR0_REGION_INDEX:
		if (count % 4)
			return -EINVAL;
		for (; count; count -= 4, bytes += 4, at += 4) {
			if (write)
				register_write(td, at, get_unaligned_le32(bytes));
			else
				put_unaligned_le32(register_read(td, at), bytes);
		}
		return 0;
	case VFIO_PCI_BAR1_REGION_INDEX:
		/* By who has mapped it, it is reached without this. */
		td_count(td, TD_C_MEMORY_ACCESSES);
		memcpy(write ? memory + at : bytes, write ? bytes : memory + at, count);
		return 0;
	default: /* The table of MSI-X belongs to the monitor. */
		if (!write)
			memset(bytes, 0, count);
		return 0;
	}
}

static u64 region_size(unsigned int region)
{
	if (region == VFIO_PCI_CONFIG_REGION_INDEX)
		return 256;
	return region <= VFIO_PCI_BAR2_REGION_INDEX ? TD_BAR_SIZE : 0;
}

static ssize_t region_access(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos, bool write)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);
	unsigned int region = *ppos >> TD_REGION_SHIFT;
	u64 at = *ppos & (TD_REGION(1) - 1), size = region_size(region);
	size_t done = 0;
	int error = 0;

	if (at >= size)
		return -EINVAL;
	count = min_t(u64, count, size - at);
	mutex_lock(&td->lock);
	while (done < count && !error) {
		u64 here = at + done;
		size_t piece = count - done >= 8 && !(here & 7) ? 8 : count - done >= 4 && !(here & 3) ? 4 :
			       count - done >= 2 && !(here & 1) ? 2 : 1;
		u8 bytes[8];

		if (write && copy_from_user(bytes, buf + done, piece))
			error = -EFAULT;
		if (!error)
			error = access(td, region, here, bytes, piece, write);
		if (!error && !write && copy_to_user(buf + done, bytes, piece))
			error = -EFAULT;
		done += piece;
	}
	mutex_unlock(&td->lock);
	if (error)
		return error;
	*ppos += done;
	return done;
}

ssize_t td_region_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos)
{
	return region_access(vdev, buf, count, ppos, false);
}

ssize_t td_region_write(struct vfio_device *vdev, const char __user *buf, size_t count, loff_t *ppos)
{
	return region_access(vdev, (char __user *)buf, count, ppos, true);
}

/* BAR 1 is a page of memory. */
int td_region_mmap(struct vfio_device *vdev, struct vm_area_struct *vma)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);

	if (vma->vm_pgoff != TD_REGION(VFIO_PCI_BAR1_REGION_INDEX) >> PAGE_SHIFT ||
	    vma->vm_end - vma->vm_start != TD_BAR_SIZE || !(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	return vm_insert_page(vma, vma->vm_start, td->shared);
}

long td_region_info(struct testdev *td, unsigned long arg)
{
	struct vfio_region_info info;
	size_t size = offsetofend(struct vfio_region_info, offset);

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size || info.index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	info.cap_offset = 0;
	info.offset = TD_REGION(info.index);
	info.size = region_size(info.index);
	info.flags = info.size ? VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE : 0;
	if (info.index == VFIO_PCI_BAR1_REGION_INDEX)
		info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}
