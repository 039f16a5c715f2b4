//! What a vCPU is, beside the guest's memory: what goes over at the switch.

#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::CpuState;

#[cfg(not(target_arch = "x86_64"))]
pub(super) use other::CpuState;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use anyhow::{Context, Result, ensure};
    use kvm_bindings::{
        Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
    };
    use kvm_ioctls::VcpuFd;
    use serde::{Deserialize, Serialize};

    const TSC: u32 = 0x10;
    /// What a guest in user mode can have set, or can see: the entry points of its system calls, the base that `swapgs`
    /// brings, the caches' kinds, and the CPU's number. Those that KVM does not know are left out.
    const MSRS: [u32; 10] = [
        0x174,
        0x175,
        0x176, // SYSENTER
        0x277, // PAT
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084, // STAR, LSTAR, CSTAR, FMASK
        0xc000_0102, // KERNEL_GS_BASE
        0xc000_0103, // TSC_AUX
    ];

    /// The state of a vCPU that stands still.
    #[derive(Debug, Serialize, Deserialize)]
    pub(in crate::migrate) struct CpuState {
        regs: kvm_regs,
        sregs: kvm_sregs,
        xsave: kvm_xsave,
        xcrs: kvm_xcrs,
        debug: kvm_debugregs,
        events: kvm_vcpu_events,
        mp: kvm_mp_state,
        msrs: Vec<(u32, u64)>,
        tsc: u64,
    }

    impl CpuState {
        pub(in crate::migrate) fn save(fd: &VcpuFd) -> Result<Self> {
            let msrs = MSRS.into_iter().filter_map(|index| Some((index, read(fd, index).ok()?))).collect();
            Ok(Self {
                regs: fd.get_regs().context("KVM_GET_REGS")?,
                sregs: fd.get_sregs().context("KVM_GET_SREGS")?,
                xsave: fd.get_xsave().context("KVM_GET_XSAVE")?,
                xcrs: fd.get_xcrs().context("KVM_GET_XCRS")?,
                debug: fd.get_debug_regs().context("KVM_GET_DEBUGREGS")?,
                events: fd.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?,
                mp: fd.get_mp_state().context("KVM_GET_MP_STATE")?,
                tsc: read(fd, TSC).context("the TSC")?,
                msrs,
            })
        }

        /// Gives it to a vCPU, all but the TSC.
        pub(in crate::migrate) fn restore(&self, fd: &VcpuFd) -> Result<()> {
            fd.set_sregs(&self.sregs).context("KVM_SET_SREGS")?;
            fd.set_regs(&self.regs).context("KVM_SET_REGS")?;
            fd.set_xcrs(&self.xcrs).context("KVM_SET_XCRS")?;
            // SAFETY: the vCPU has no feature whose state is larger than this structure: none was asked for.
            unsafe { fd.set_xsave(&self.xsave) }.context("KVM_SET_XSAVE")?;
            for &(index, value) in &self.msrs {
                write(fd, index, value)?;
            }
            fd.set_debug_regs(&self.debug).context("KVM_SET_DEBUGREGS")?;
            fd.set_vcpu_events(&self.events).context("KVM_SET_VCPU_EVENTS")?;
            fd.set_mp_state(self.mp).context("KVM_SET_MP_STATE")
        }

        /// Sets the TSC to what it was, and what has passed since: the guest's clock goes on.
        pub(in crate::migrate) fn restore_clock(&self, fd: &VcpuFd, ticks: u64) -> Result<()> {
            write(fd, TSC, self.tsc.wrapping_add(ticks))
        }
    }

    fn read(fd: &VcpuFd, index: u32) -> Result<u64> {
        let mut msrs = list(index, 0)?;
        ensure!(fd.get_msrs(&mut msrs).context("KVM_GET_MSRS")? == 1, "KVM does not know MSR {index:#x}");
        Ok(msrs.as_slice()[0].data)
    }

    fn write(fd: &VcpuFd, index: u32, data: u64) -> Result<()> {
        let set = fd.set_msrs(&list(index, data)?).context("KVM_SET_MSRS")?;
        ensure!(set == 1, "KVM refuses MSR {index:#x}");
        Ok(())
    }

    fn list(index: u32, data: u64) -> Result<Msrs> {
        Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]).context("a list of one MSR")
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod other {
    use anyhow::{Result, bail};
    use kvm_ioctls::VcpuFd;
    use serde::{Deserialize, Serialize};

    /// None: only x86-64 vCPUs are migrated.
    #[derive(Debug, Serialize, Deserialize)]
    pub(in crate::migrate) struct CpuState {}

    impl CpuState {
        pub(in crate::migrate) fn save(_: &VcpuFd) -> Result<Self> {
            bail!("only x86-64 vCPUs can be migrated: of others the state is not known here")
        }

        pub(in crate::migrate) fn restore(&self, fd: &VcpuFd) -> Result<()> {
            Self::save(fd).map(drop)
        }

        pub(in crate::migrate) fn restore_clock(&self, fd: &VcpuFd, _: u64) -> Result<()> {
            Self::save(fd).map(drop)
        }
    }
}
